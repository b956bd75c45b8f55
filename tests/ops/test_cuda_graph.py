"""A CUDA graph captures every op, forward and backward: the host waits for nothing, and copies nothing, on the way."""

import pytest
import torch
from conftest import DEVICE
from contract import case_id, cases, copy, leaves, outputs, run, sample_grad_outputs

import fastllm

pytestmark = pytest.mark.runs_on("gpu")


def _step(op, sample, backend, upstream):
    """As contract.run, with gradients of the outputs that are on the device already."""
    with fastllm.backend(backend):
        outs = outputs(op.function(*sample.args, **sample.kwargs))
        ways = [(y, g) for y, g in zip(outs, upstream, strict=True) if y.requires_grad]
        wanted = leaves(sample)
        if not ways or not wanted:
            return outs
        ys, given = zip(*ways, strict=True)
        return [*outs, *torch.autograd.grad(ys, wanted, given, allow_unused=True)]


# Of tensors without elements, which some samples have, nothing is launched.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize(("op", "backend"), cases(DEVICE, kernels_only=True), ids=case_id)
def test_a_graph_captures_forward_and_backward(op, backend):
    torch.manual_seed(1)
    every = list(op.samples(DEVICE, torch.float32))
    for sample in map(copy, every[:: max(1, len(every) // 4)]):
        # What is compiled or loaded at a first call is there afterwards.
        outs, _ = run(op.function, sample, backend)
        upstream = sample_grad_outputs(sample.name, outs)
        expected = [None if t is None else t.detach().clone() for t in _step(op, sample, backend, upstream)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(op, sample, backend, upstream)
        for t in captured:
            if t is not None:
                t.detach().fill_(torch.nan)
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert (got is None) == (want is None), sample.name
            if got is not None:
                torch.testing.assert_close(got.detach(), want, rtol=0, atol=0, equal_nan=True)
