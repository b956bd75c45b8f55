"""Attention backward for Hopper (sm_90), in Gluon: plain dense attention in fp16 and bf16, in one pass.

It has never run on a GPU. What is known of it: it compiles for sm_90, and its source gives the right
results in an emulator of barriers, copies and asynchronous products (tests/kernels/test_attention_hopper_backward.py).
It serves only those who ask for the backend ``hopper``.

After FlashAttention-3 (Shah et al. 2024): five products for a pair of tiles, where the portable kernels' two passes
have seven. kernels/attention/hopper_backward_warps.py has the parts. The parts of dq are added to fp32 sums in global
memory in a fixed order, so that results repeat bit for bit. FASTLLM_ATOMIC_DQ=1 has them added in any order, unless
torch.use_deterministic_algorithms is on.
"""

import os

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch_options
from .backward import attention_bwd
from .hopper import barriers, descriptor, feature_refuses, uncopyable
from .hopper_backward_warps import (
    BackwardMode,
    BackwardSums,
    BackwardWork,
    KeyGradients,
    Rings,
    add,
    copy,
    multiply,
)
from .hopper_warps import Ring
from .problem import Problem
from .scores import load_tile, matrix_of, store_tile
from .values import Plane

# Head dim -> query rows of a step, keys of a program, buffers of q and dout. Not timed yet. Nothing spills, with Triton
# 3.6 and 3.9, by a narrow margin: two sums, both scores and a row's numbers take 208 of 232 registers at 128.
SETTINGS = {
    64: dict(BLOCK_M=64, BLOCK_N=128, STAGES=4),
    128: dict(BLOCK_M=64, BLOCK_N=128, STAGES=2),
}


@triton.jit
def _attention_hopper_rows_kernel(
    out, dout, dlse, stats, row_stats, sums, unit, sizes, n_tiles, ALIGN: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of each query row: shift = row_max * unit + row_log2 and delta = sum(dout * out) - dlse; and empty sums."""
    program = tl.program_id(0)
    plane = (program // n_tiles).to(tl.int64)
    b, head = plane // sizes.heads, plane % sizes.heads
    rows = program % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < sizes.rows
    out_tile = load_tile(matrix_of(out, b, head, 0, DIM, BLOCK=DIM, ALIGN=ALIGN), rows, in_rows).to(tl.float32)
    dout_tile = load_tile(matrix_of(dout, b, head, 0, DIM, BLOCK=DIM, ALIGN=ALIGN), rows, in_rows).to(tl.float32)
    delta = tl.sum(out_tile * dout_tile, axis=1)
    if dlse is not None:
        at_dlse = b * dlse.batch + head * dlse.head + rows * dlse.row
        delta -= tl.load(dlse.ptr + at_dlse, mask=in_rows, other=0.0).to(tl.float32)
    at_stats = b * stats.batch + head * stats.head + rows
    row_max = tl.load(stats.row_max + at_stats, mask=in_rows, other=0.0)
    row_log2 = tl.load(stats.row_log2 + at_stats, mask=in_rows, other=float("inf"))
    place = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(row_stats.ptr + place, row_max * unit + row_log2)
    # Rows that saw nothing have no gradient, whatever came in for them.
    tl.store(row_stats.ptr + row_stats.row + place, tl.where(row_log2 == float("inf"), 0.0, delta))
    tl.store(sums.dq + place[:, None] * DIM + tl.arange(0, DIM)[None, :], tl.zeros((BLOCK_M, DIM), tl.float32))
    tl.store(sums.turns + program, 0)


@triton.jit
def _attention_hopper_dq_kernel(
    dq, sums, scale, sizes, n_tiles, ALIGN: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr
):
    """dq from its fp32 sums."""
    program = tl.program_id(0)
    plane = (program // n_tiles).to(tl.int64)
    b, head = plane // sizes.heads, plane % sizes.heads
    rows = program % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    place = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.load(sums.dq + place[:, None] * DIM + tl.arange(0, DIM)[None, :])
    store_tile(matrix_of(dq, b, head, 0, DIM, BLOCK=DIM, ALIGN=ALIGN), total * scale, rows, rows < sizes.rows)


@gluon.jit
def _attention_hopper_bwd_kernel(
    k_desc, v_desc, q_desc, dout_desc, stats_desc, grads, sums, work, sizes, unit, scale, mode: gl.constexpr
):
    BLOCK_M: gl.constexpr = mode.block_m
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    STAGES: gl.constexpr = mode.stages
    dtype: gl.constexpr = k_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, DIM], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], dout_desc.layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], stats_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ds = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    # Rows that are stored together lie in different banks.
    dq_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    dq_smem = gl.allocate_shared_memory(gl.float32, [1, BLOCK_M, DIM], dq_layout)
    k_full, k_empty = barriers(1, 1)
    v_full, v_empty = barriers(1, 1)
    q_full, q_empty = barriers(STAGES, 1)
    dout_full, dout_empty = barriers(STAGES, 1)
    dq_full, dq_empty = barriers(1, 1)
    rings = Rings(
        Ring(k_smem, k_full, k_empty), Ring(v_smem, v_full, v_empty), Ring(q_smem, q_full, q_empty),
        Ring(dout_smem, dout_full, dout_empty), stats, ds,
        Ring(dq_smem, dq_full, dq_empty),
    )  # fmt: skip
    descs = (k_desc, v_desc, q_desc, dout_desc, stats_desc)
    gl.warp_specialize(
        [
            (multiply, (rings, work, sizes, grads, unit, scale, mode)),
            (add, (rings, work, sizes, sums, mode)),
            (copy, (descs, rings, work, sizes, mode)),
        ],
        [2, 1],
        # Of 168 registers a thread at the start; the two warpgroups get 232.
        [40, 40],
    )


def hopper_backward_refuses(problem: Problem, dout: torch.Tensor, wanted) -> str | None:
    """Why this kernel cannot take a gradient, which is then the portable kernels'; None if it can."""
    if (why := feature_refuses(problem)) is not None:
        return why
    if problem.packed:
        return "its sequences are packed"
    if wanted.dq is None or wanted.dk is None or wanted.dv is None:
        return "not all of its gradients are wanted"
    rows = SETTINGS[problem.dim]["BLOCK_M"]
    if problem.heads * problem.programs(rows, problem.rows).per_head * rows >= 2**31:
        return "it has too many rows for the copy engine's coordinates"
    tensors = (problem.q, problem.k, problem.v, dout)
    return next((why for x in tensors if (why := uncopyable(problem, x))), None)


def attention_hopper_bwd(call, forward, upstream, wanted):
    """As backward.attention_bwd, which serves what :func:`hopper_backward_refuses` gives a reason against."""
    problem = Problem(call)
    if hopper_backward_refuses(problem, upstream.dout, wanted) is not None:
        return attention_bwd(call, forward, upstream, wanted)
    _launch(problem, forward, upstream, wanted)
    return None, None


def _ordered() -> bool:
    asked = os.environ.get("FASTLLM_ATOMIC_DQ", "0") not in ("", "0")
    return not asked or torch.are_deterministic_algorithms_enabled()


def _launch(problem: Problem, forward, upstream, wanted) -> None:
    setting = SETTINGS[problem.dim]
    block_m, block_n = setting["BLOCK_M"], setting["BLOCK_N"]
    queries, keys = problem.programs(block_m, problem.rows), problem.programs(block_n, problem.cols)
    slots = problem.batch * problem.heads * queries.tiles
    new = problem.q.new_empty
    row_stats = new((2, slots * block_m), dtype=torch.float32)
    sums = BackwardSums(new((slots, block_m, problem.dim), dtype=torch.float32), new(slots, dtype=torch.int32))
    dlse = None
    if upstream.dlse is not None:
        strides = upstream.dlse.stride()
        dlse = Plane(upstream.dlse, *strides, col=0)
    rows = dict(ALIGN=8, DIM=problem.dim, BLOCK_M=block_m, **launch_options(problem.q.device, num_warps=8))
    _attention_hopper_rows_kernel[(slots,)](
        problem.plane(forward.out), problem.plane(upstream.dout), dlse, problem.statistics(forward.stats),
        Plane(row_stats, 0, 0, row_stats.stride(0), 1), sums, problem.score.unit, problem.sizes, queries.tiles, **rows,
    )  # fmt: skip
    mode = BackwardMode(
        causal=problem.score.right is not None,
        bottom_right=problem.bottom_right,
        ordered=_ordered(),
        block_m=block_m,
        block_n=block_n,
        dim=problem.dim,
        stages=setting["STAGES"],
    )
    _attention_hopper_bwd_kernel[(problem.batch * problem.heads_kv * keys.tiles,)](
        *(descriptor(problem, x, block_n) for x in (problem.k, problem.v)),
        *(descriptor(problem, x, block_m) for x in (problem.q, upstream.dout)),
        _statistics_descriptor(row_stats, block_m), KeyGradients(problem.plane(wanted.dk), problem.plane(wanted.dv)),
        sums, BackwardWork(keys.tiles, queries.tiles, problem.heads_kv), problem.sizes,
        float(problem.score.unit), float(problem.score.scale), mode=mode,
        **launch_options(problem.q.device, num_warps=8),
    )  # fmt: skip
    _attention_hopper_dq_kernel[(slots,)](
        problem.plane(wanted.dq), sums, problem.score.scale, problem.sizes, queries.tiles, **rows
    )


def _statistics_descriptor(row_stats: torch.Tensor, rows: int) -> TensorDescriptor:
    """``row_stats``, (2, n), copied ``rows`` numbers at a time."""
    block = [1, rows]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
    return TensorDescriptor(row_stats, list(row_stats.shape), list(row_stats.stride()), block, layout)
