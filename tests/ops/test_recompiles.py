"""One graph serves every shape: torch.compile makes no more of them for an op than for PyTorch's own operators."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import case_id, graph_cases, outputs
from torch._dynamo.testing import CompileCounterWithBackend

import fastllm
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

SIZES = (7, 13, 64, 33, 130)


def _leaf(*shape):
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def _angles(n):
    return (torch.randn(n, 8, device=DEVICE) for _ in range(2))


def _ids(high, *shape):
    return torch.randint(high, shape, device=DEVICE)


# Op -> its arguments for n rows (tokens, positions); what does not grow with them keeps its size.
CALLS = {
    "layer_norm": lambda n: (_leaf(n, 24), (24,), _leaf(24), _leaf(24)),
    "rms_norm": lambda n: (_leaf(n, 24), (24,), _leaf(24)),
    "add_layer_norm": lambda n: (_leaf(n, 24), _leaf(n, 24), (24,), _leaf(24), _leaf(24)),
    "add_rms_norm": lambda n: (_leaf(n, 24), _leaf(n, 24), (24,), _leaf(24)),
    "linear": lambda n: (_leaf(n, 24), _leaf(31, 24), _leaf(31)),
    "swiglu": lambda n: (_leaf(n, 24), _leaf(n, 24)),
    "geglu": lambda n: (_leaf(n, 24), _leaf(n, 24)),
    "rotary_embedding": lambda n: (_leaf(2, 3, n, 16), _leaf(2, 3, n, 16), *_angles(n)),
    "attention": lambda n: (_leaf(2, 3, n, 16), _leaf(2, 3, n, 16), _leaf(2, 3, n, 16)),
    "scaled_dot_product_attention": lambda n: (_leaf(2, 3, n, 16), _leaf(2, 3, n, 16), _leaf(2, 3, n, 16)),
    "embedding": lambda n: (_ids(40, n), _leaf(40, 16)),
    "embedding_sum": lambda n: ([_ids(40, n), _ids(9, n)], [_leaf(40, 16), _leaf(9, 16)]),
    "cross_entropy": lambda n: (_leaf(n, 31), _ids(31, n)),
    "linear_cross_entropy": lambda n: (_leaf(n, 24), _leaf(31, 24), _ids(31, n)),
    "linear_log_probs": lambda n: (_leaf(n, 24), _leaf(31, 24), _ids(31, n)),
    "linear_kl_div": lambda n: (_leaf(n, 24), _leaf(31, 24), _leaf(n, 20), _leaf(31, 20)),
}


def graphs(function, make) -> tuple[int, int]:
    """(graphs compiled for the first of SIZES, for the others), forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for n in SIZES:
        result = compiled(*make(n))
        sum(output.sum() for output in outputs(result)).backward()
        first = first or counter.frame_count
    return first, counter.frame_count - first


@functools.cache
def further_graphs_of_torch(name: str) -> int:
    """Of an op that PyTorch has, what its own takes past the first size; of others none is needed."""
    return graphs(getattr(F, name), CALLS[name])[1] if hasattr(F, name) else 0


@pytest.mark.runs_on("anywhere")
def test_every_op_has_a_call():
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize(("op", "backend"), graph_cases(DEVICE), ids=case_id)
def test_a_graph_serves_every_size(op, backend):
    theirs = further_graphs_of_torch(op.name)
    with fastllm.backend(backend):
        _, more = graphs(op.function, CALLS[op.name])
    assert more <= theirs, f"{more} further graphs for {len(SIZES) - 1} sizes; PyTorch's own takes {theirs}"
