"""The traffic counter, on kernels whose bytes are known by hand, and the norms against their least bytes."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm import OPS
from fastllm.bench.traffic import CACHED, UNMAPPED, count_traffic, measure
from fastllm.kernels.norm import backward as _norm_backward
from fastllm.kernels.norm import forward as _norm
from fastllm.registry import Sample

pytestmark = pytest.mark.runs_on("interpreter")


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def _copy_unmasked(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _two_passes(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + row * n + at, mask=at < n, other=0.0))
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + row * n + at, tl.load(x_ptr + row * n + at, mask=at < n) / total, mask=at < n)


@triton.jit
def _scale(x_ptr, scale_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + at, mask=at < n)
    tl.store(y_ptr + row * n + at, x * tl.load(scale_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def _histogram(ids_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < n, other=0)
    tl.atomic_add(counts_ptr + ids, 1, mask=at < n)


@triton.jit
def _swap(flag_ptr):
    tl.atomic_cas(flag_ptr, 0, 1)


@triton.jit
def _copy_descriptor(x, y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    y.store([m, n], x.load([m, n]))


@triton.jit
def _copy_from_address(address, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(address.to(tl.pointer_type(tl.float32)) + at))


def _by_tensor(traffic):
    return {a.tensor: (a.loaded, a.stored, a.reread) for a in traffic.accesses}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int8, 1)])
def test_copy(dtype, size):
    x = torch.ones(256).to(dtype)
    y = torch.empty_like(x)
    with count_traffic() as traffic:
        _copy_unmasked[(4,)](x, y, BLOCK=64)
    assert _by_tensor(traffic) == {"x_ptr": (256 * size, 0, 0), "y_ptr": (0, 256 * size, 0)}
    assert torch.equal(x, y)


def test_masked_tail_counts_only_its_lanes():
    x, y = torch.randn(100), torch.empty(100)
    with count_traffic() as traffic:
        _copy[(2,)](x, y, 100, BLOCK=64)
    assert (traffic.loaded, traffic.stored, traffic.total) == (400, 400, 800)


def test_a_second_pass_counts_again():
    x, y = torch.rand(3, 50), torch.empty(3, 50)
    with count_traffic() as traffic:
        _two_passes[(3,)](x, y, 50, BLOCK=16)
    assert _by_tensor(traffic) == {"x_ptr": (2 * 600, 0, 0), "y_ptr": (0, 600, 0)}


def test_what_programs_share_counts_once_and_rereads_apart():
    x, scale, y = torch.randn(5, 30), torch.randn(30), torch.empty(5, 30)
    with count_traffic() as traffic:
        _scale[(5,)](x, scale, y, 30, BLOCK=32)
    assert _by_tensor(traffic) == {"x_ptr": (600, 0, 0), "scale_ptr": (120, 0, 480), "y_ptr": (0, 600, 0)}


def test_what_no_cache_holds_counts_every_time():
    n = CACHED // 4 + 1
    x, scale, y = torch.zeros(2, n), torch.zeros(n), torch.empty(2, n)
    with count_traffic() as traffic:
        _scale[(2,)](x, scale, y, n, BLOCK=triton.next_power_of_2(n))
    assert _by_tensor(traffic)["scale_ptr"] == (8 * n, 0, 0)


def test_atomics_load_and_store():
    ids, counts = torch.randint(0, 8, (100,)), torch.zeros(8, dtype=torch.int32)
    with count_traffic() as traffic:
        _histogram[(2,)](ids, counts, 100, BLOCK=64)
    assert _by_tensor(traffic)["ids_ptr"] == (800, 0, 0)
    loaded, stored, reread = _by_tensor(traffic)["counts_ptr"]
    assert (loaded + reread, stored) == (400, 400)
    assert torch.equal(counts.long(), torch.bincount(ids, minlength=8))
    flag = torch.zeros(1, dtype=torch.int32)
    with count_traffic() as traffic:
        _swap[(1,)](flag)
    assert _by_tensor(traffic) == {"flag_ptr": (4, 4, 0)}


def test_descriptors_count_what_lies_inside():
    x, y = torch.randn(10, 20), torch.empty(10, 20)
    with count_traffic() as traffic:
        _copy_descriptor[(2, 2)](
            TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(y, [8, 16]), BLOCK_M=8, BLOCK_N=16
        )
    assert _by_tensor(traffic) == {"x": (800, 0, 0), "y": (0, 800, 0)}
    assert torch.equal(x, y)


def test_views_of_one_storage_are_one_tensor():
    both = torch.randn(128)
    with count_traffic() as traffic:
        _copy_unmasked[(1,)](both[:64], both[64:], BLOCK=64)
    assert _by_tensor(traffic) == {"x_ptr": (256, 256, 0)}


def test_an_address_outside_every_argument_is_listed_as_such():
    x, y = torch.randn(16), torch.empty(16)
    with count_traffic() as traffic:
        _copy_from_address[(1,)](x.data_ptr(), y, BLOCK=16)
    assert _by_tensor(traffic) == {UNMAPPED: (64, 0, 0), "y_ptr": (0, 64, 0)}


def test_some_programs_stand_for_the_whole_grid():
    x, scale, y = torch.randn(40, 30), torch.randn(30), torch.full((40, 30), 7.0)
    with count_traffic(programs=4) as traffic:
        _scale[lambda arguments: (arguments["n"] + 10,)](x, scale, y, 30, BLOCK=32)
    assert _by_tensor(traffic) == {"x_ptr": (4800, 0, 0), "scale_ptr": (120, 0, 4680), "y_ptr": (0, 4800, 0)}
    written = (y != 7.0).any(1).nonzero().flatten().tolist()
    assert written == [5, 15, 25, 35]
    x, y = torch.randn(12, 40), torch.empty(12, 40)
    with count_traffic(programs=2) as traffic:
        _copy_descriptor[(2, 3)](
            TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(y, [8, 16]), BLOCK_M=8, BLOCK_N=16
        )
    # Programs 1 and 4 of 6, (0, 1) and (1, 1): 8 x 16 and 4 x 16 elements, thrice.
    assert traffic.loaded == traffic.stored == 3 * 12 * 16 * 4


def test_the_counter_goes_away():
    x, y = torch.randn(64), torch.empty(64)
    with count_traffic() as traffic:
        _copy_unmasked[(1,)](x, y, BLOCK=64)
    _copy_unmasked[(1,)](x, y, BLOCK=64)
    assert traffic.total == 512
    assert "x_ptr" in traffic.table()


def _norm_call(op, rows, cols, dtype):
    parameters = {"weight": torch.randn(cols, dtype=dtype).requires_grad_()}
    if op.endswith("layer_norm"):
        parameters["bias"] = torch.randn(cols, dtype=dtype).requires_grad_()
    inputs = [torch.randn(rows, cols, dtype=dtype).requires_grad_() for _ in range(2 if op.startswith("add") else 1)]
    return Sample("", (*inputs, (cols,)), parameters)


# The statistics cost 8 bytes a row (4 for RMS norm) and each program leaves rows of fp32 partial sums that a second
# kernel reads: neither is among the least bytes. 512 columns make the first 0.4% of the forward. The interpreter has
# 4 processors where a GPU has 132 or so: 512 rows give each program the 128 or so that 16384 give it there, and the
# partial sums of LayerNorm, 16 bytes a column and program beside 6 a column and row, are then 2.1% of the backward.
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_norms_move_little_more_than_the_least_bytes(op):
    measured = measure(OPS[op], _norm_call(op, 512, 512, torch.bfloat16))
    assert 1.0 <= measured.forward_ratio <= 1.02, measured.forward.table()
    assert 1.0 <= measured.backward_ratio <= 1.05, measured.backward.table()


@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_rows_held_as_16_bits_are_read_once(op, monkeypatch):
    monkeypatch.setattr(_norm, "FWD_ROW", 512)
    measured = measure(OPS[op], _norm_call(op, 16, 1024, torch.bfloat16), backward=False)
    assert {a.kernel for a in measured.forward.accesses} == {"_norm_fwd_packed_kernel"}
    assert 1.0 <= measured.forward_ratio <= 1.02, measured.forward.table()


# 8 blocks a row, so one cluster of the interpreter's 4 processors: 96 rows a program, of about 500 on a GPU.
@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm"])
def test_rows_shared_by_a_cluster_are_read_once(op, monkeypatch):
    monkeypatch.setattr(_norm, "FWD_ROW", 64)
    monkeypatch.setattr(_norm_backward, "BWD_ROW", 64)
    measured = measure(OPS[op], _norm_call(op, 96, 512, torch.float32))
    assert {a.kernel for a in measured.forward.accesses} == {"_norm_fwd_row_kernel"}
    assert "_norm_bwd_row_kernel" in {a.kernel for a in measured.backward.accesses}
    assert 1.0 <= measured.forward_ratio <= 1.02, measured.forward.table()
    assert 1.0 <= measured.backward_ratio <= 1.05, measured.backward.table()


def test_an_extra_read_shows(monkeypatch):
    monkeypatch.setattr(_norm, "FWD_ROW", 0)  # every row in blocks: x is read twice, in the backward dy too
    monkeypatch.setattr(_norm_backward, "BWD_ROW", 0)
    measured = measure(OPS["layer_norm"], _norm_call("layer_norm", 64, 512, torch.bfloat16))
    assert measured.forward_ratio > 1.4
    assert measured.backward_ratio > 1.6


def test_a_copy_in_the_launcher_shows():
    x = torch.randn(256, 64).t().requires_grad_()
    sample = Sample("", (x, (256,)), {})
    measured = measure(OPS["rms_norm"], sample, backward=False)
    assert [a.kernel for a in measured.forward.accesses if a.kernel.startswith("aten")] == ["aten::contiguous"]
    assert measured.forward_ratio == pytest.approx(2.0, abs=0.01)
