"""bench/<op>.py: every shape of every op makes a call that the op takes."""

import inspect

import pytest
import torch

from fastllm import OPS
from fastllm.bench import cases
from fastllm.bench.embedding import zipf_ids

NAMES = [(op, name) for op in OPS if cases.shapes_of(op) for name in cases.shapes_of(op)]


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_a_shape_is_a_call_of_its_op(op, name):
    call = cases.shapes_of(op)[name](torch.device("meta"), torch.bfloat16)
    assert cases.differentiable(call)
    assert cases.held_bytes(call) > 0
    inspect.signature(OPS[op].function).bind(*call.args, **call.kwargs)


def test_ids_follow_zipf():
    ids = zipf_ids(1 << 16, 1000, torch.device("cpu"))
    counts = torch.bincount(ids, minlength=1000)
    assert counts.shape == (1000,)
    # P(id < k) = log(k + 1) / log(1001)
    for k in (1, 10, 100):
        expected = torch.tensor(k + 1.0).log() / torch.tensor(1001.0).log()
        assert counts[:k].sum() / ids.numel() == pytest.approx(float(expected), abs=0.01)
