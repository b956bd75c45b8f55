"""A bias of packed sequences that has no room for one of them. The host names it where it reads cu_seqlens.

It does not on a GPU, nor where torch.compile traces: what comes before the kernel fails then.
"""

import math

import pytest
import torch

import fastllm
from fastllm.functional import attention

# On a GPU the assertion would end the process's use of it.
pytestmark = pytest.mark.runs_on("interpreter")

STARTS = torch.tensor([0, 3, 8])


@pytest.fixture(autouse=True)
def _unread(monkeypatch):
    """As on a GPU: the host does not read where sequences start."""
    monkeypatch.setattr("fastllm.ops.attention.call._check_cu", lambda op, name, cu, rows, query: cu)


def _call(bias):
    q, k, v = torch.randn(3, 8, 2, 16)
    rows, cols = bias.shape[-2:]
    return attention(q, k, v, bias=bias, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, max_seqlen_q=rows, max_seqlen_k=cols)


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 4), (4, 1), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_bias_is_not_read_past_its_end(shape, dtype):
    # What lies past it would make the output NaN, or would be read as True.
    memory = torch.full((2, 2, 8, 8), math.nan).to(dtype)
    bias = memory[:, :, : shape[0], : shape[1]].fill_(0)
    with (
        fastllm.backend("triton"),
        pytest.raises(RuntimeError, match="attention: a sequence is longer than max_seqlen_q or max_seqlen_k"),
    ):
        _call(bias)


@pytest.mark.parametrize("shape", [(5, 5), (7, 6), (1, 5), (5, 1), (1, 1)])
def test_a_bias_with_room_or_of_one_row_serves_any_length(shape):
    with fastllm.backend("triton"):
        assert _call(torch.zeros(2, 2, *shape)).isfinite().all()
