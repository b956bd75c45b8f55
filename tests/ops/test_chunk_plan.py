"""How many rows of logits the linear losses hold at a time, and what a plan says of a call."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE

from fastllm.functional import linear_cross_entropy_plan
from fastllm.ops.cross_entropy import chunks
from fastllm.ops.cross_entropy.call import Chunking


@pytest.mark.runs_on("gpu", "interpreter")
def test_plan_says_what_will_run():
    x, w = (torch.randn(rows, 8, device=DEVICE, requires_grad=True) for rows in (1000, 5000))
    plan = linear_cross_entropy_plan(x, w, max_workspace_mb=4)
    assert plan.rows * plan.chunks >= 1000
    assert plan.workspace_bytes <= 4 * 2**20
    assert "3 matmuls" in str(plan)
    assert "recompute" in linear_cross_entropy_plan(x, w, reduction="none").lane
    with torch.no_grad():
        assert "loss only" in linear_cross_entropy_plan(x, w).lane


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(("rows", "expected"), [(8192, 2), (16383, 4), (16384, 2), (65536, 7)])
def test_many_rows_take_larger_chunks_on_cuda(rows, expected):
    """A head of 128,256 classes in bfloat16, whose gradient is added up in fp32 from chunk to chunk."""
    default, given = Chunking(None, None, True, False), Chunking(5.0, None, True, False)
    bytes_of_row = chunks.bytes_per_row(128256, torch.bfloat16, "triton", False, False)
    weight = SimpleNamespace(device=torch.device("cuda"))
    workspace = chunks.workspace_mb(default, weight, rows, bytes_of_row)
    assert chunks.chunk_plan(rows, bytes_of_row, workspace).chunks == expected
    assert chunks.workspace_mb(given, weight, rows, bytes_of_row) == 5.0


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("rows", "features", "classes", "expected"),
    [(512, 512, 50304, 1), (8192, 512, 50304, 16), (1024, 4096, 50304, 1), (8192, 16, 50304, 32), (8192, 512, 1024, 1)],
)
def test_few_rows_are_one_chunk_on_a_cpu(rows, features, classes, expected):
    """In no more memory than the weight takes, where that is more than 64 MiB."""
    x, w = torch.empty(rows, features, device="meta"), torch.empty(classes, features, device="meta")
    row_bytes = chunks.bytes_per_row(classes, x.dtype, "native", False, False)
    workspace = chunks.workspace_mb(Chunking(None, None, True, False), w, rows, row_bytes)
    plan = chunks.chunk_plan(rows, row_bytes, workspace)
    assert plan.chunks == expected
    assert plan.workspace_bytes <= max(64 * 2**20, w.numel() * 4)
