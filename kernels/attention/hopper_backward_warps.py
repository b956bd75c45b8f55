"""The parts of the Hopper attention backward: what a program works on, and what each of its groups of warps does.

A program has a tile of keys and walks the query tiles that see it, for each head of its group. One warp copies, two
warpgroups multiply, and two warps add the product for dq to fp32 sums in global memory. They meet at mbarriers, as in
:mod:`.hopper_warps`. Query tile number ``use`` of a program takes buffer ``use % STAGES`` of the rings q and dout, and
the one buffer of dq.

The sums of a query tile get one addend from each key tile that it sees. In order, these come from the last key tile to
the first: ``turns`` counts, for each query tile, the addends that are there. A program waits for programs of lower
numbers alone, which a GPU starts first. Under a causal mask it waits for none, once all have begun: each key tile
begins at its diagonal, where it is the first.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch import keyed
from .hopper_warps import Ring, async_load
from .values import Plane

# Triton 3.7 has the barrier of a group of warps under a new name.
group_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Rows of dq that two warps add at a time: with 40 registers a thread they hold no more.
PART = gl.constexpr(4)


class BackwardMode(NamedTuple):
    """Constants of the kernel. ``ordered``: the sums of dq have a fixed order."""

    causal: bool
    bottom_right: bool
    ordered: bool
    block_m: int
    block_n: int
    dim: int
    stages: int


class BackwardWork(NamedTuple):
    """How many tiles of keys and of queries a head has, and how many key heads there are."""

    key_tiles: int
    query_tiles: int
    heads_kv: int


class BackwardSums(NamedTuple):
    """Where the addends of dq go: fp32 (B * H * query tiles, BLOCK_M, D), and their number for each tile."""

    dq: torch.Tensor
    turns: torch.Tensor


class KeyGradients(NamedTuple):
    """Where dk and dv are stored."""

    dk: Plane
    dv: Plane


class Rings(NamedTuple):
    """In a kernel: its shared memory. ``stats`` has shift and delta of each buffer of ``q``, full when that is."""

    k: Ring
    v: Ring
    q: Ring
    dout: Ring
    stats: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: Ring


@gluon.jit
def key_tile(work, mode: gl.constexpr):
    """This program's (plane, first): the batch and key head, of which :func:`head_of` tells, and the first column."""
    program = gl.program_id(0)
    plane = program // work.key_tiles
    # The last tile first.
    return plane, (work.key_tiles - 1 - (program - plane * work.key_tiles)) * mode.block_n


@gluon.jit
def head_of(plane, work):
    """(batch, key head) of a plane."""
    b = plane // work.heads_kv
    return b, plane - b * work.heads_kv


@gluon.jit
def query_runs(first, work, sizes, mode: gl.constexpr):
    """(offset, runs) of the columns from ``first`` on.

    The query tiles that see them are those of two runs, (begin, edge, end): tiles before edge have rows that do not see
    every column; all have where columns lie past the last.
    """
    offset = sizes.cols - sizes.rows if mode.bottom_right else 0
    begin = first * 0
    if mode.causal:
        begin = gl.maximum(first - offset, 0) // mode.block_m
    end = gl.maximum(work.query_tiles, begin)
    edge = begin
    if mode.causal:
        edge = gl.minimum(gl.cdiv(gl.maximum(first + mode.block_n - 1 - offset, 0), mode.block_m), end)
    if first + mode.block_n > sizes.cols:
        edge = end
    return offset, (begin, edge, end)


@gluon.jit
def run_of(runs, number):
    """(first, end) of the query tiles of run 0 or 1. A program does the runs one after the other, each for all heads.

    So what the first needs for its mask takes no registers in the second.
    """
    begin, edge, end = runs
    low = begin
    high = edge
    if number == 1:
        low = edge
        high = end
    return low, high


@gluon.jit
def _fill(desc, at, ring, slot):
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes)
    async_load(desc, at, ring.full.index(slot), ring.buffers.index(slot))


@gluon.jit
def copy(descs, rings, work, sizes, mode: gl.constexpr):
    """The copying warp: the keys and values, then each query tile with its statistics and output gradients."""
    k_desc, v_desc, q_desc, dout_desc, stats_desc = descs
    BLOCK_M: gl.constexpr = mode.block_m
    STAGES: gl.constexpr = mode.stages
    plane, first = key_tile(work, mode)
    b, head_kv = head_of(plane, work)
    _, runs = query_runs(first, work, sizes, mode)
    _fill(k_desc, [b, head_kv, first, 0], rings.k, 0)
    _fill(v_desc, [b, head_kv, first, 0], rings.v, 0)
    use = 0
    for number in range(2):
        low, high = run_of(runs, number)
        for member in range(sizes.group):
            head = head_kv * sizes.group + member
            for tile in range(low, high):
                slot = use % STAGES
                given_back = (use // STAGES & 1) ^ 1
                at = [b, head, tile * BLOCK_M, 0]
                place = ((b * sizes.heads + head) * work.query_tiles + tile) * BLOCK_M
                mbarrier.wait(rings.q.empty.index(slot), given_back)
                full = rings.q.full.index(slot)
                mbarrier.expect(full, q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
                async_load(q_desc, at, full, rings.q.buffers.index(slot))
                async_load(stats_desc, [0, place], full, rings.stats.index(2 * slot))
                async_load(stats_desc, [1, place], full, rings.stats.index(2 * slot + 1))
                mbarrier.wait(rings.dout.empty.index(slot), given_back)
                _fill(dout_desc, at, rings.dout, slot)
                use += 1


@gluon.jit
def _step(dk, dv, rings, use, first, row, n_cols, offset, unit, MASKED: gl.constexpr, mode: gl.constexpr):
    """One query tile, from ``row`` on: its five products.

    Scores are transposed, (keys, queries), so that the products for dv and dk take their left operand from registers.
    """
    BLOCK_M: gl.constexpr = mode.block_m
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    STAGES: gl.constexpr = mode.stages
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    grads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, DIM, 16])
    # 64 query rows are too few for two warpgroups: each then has half of the head dim.
    queries: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4 * (BLOCK_M // 64), 2 // (BLOCK_M // 64)], [16, DIM * (BLOCK_M // 64) // 2, 16]
    )
    k = rings.k.buffers.index(0).reshape([BLOCK_N, DIM])
    v = rings.v.buffers.index(0).reshape([BLOCK_N, DIM])
    slot = use % STAGES
    phase = use // STAGES & 1
    q = rings.q.buffers.index(slot).reshape([BLOCK_M, DIM])
    dout = rings.dout.buffers.index(slot).reshape([BLOCK_M, DIM])
    mbarrier.wait(rings.q.full.index(slot), phase)
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, scores)
    s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(rings.dout.full.index(slot), phase)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    # Rows past the last, and rows that see nothing, have an infinite shift.
    shift = rings.stats.index(2 * slot).reshape([BLOCK_M]).load(gl.SliceLayout(0, scores))
    p = gl.exp2(s * unit - shift[None, :])
    if MASKED:
        cols = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, scores))
        visible = (cols < n_cols)[:, None]
        if mode.causal:
            # Of numbers that change from tile to tile: constants for every pair would be kept in registers.
            rows = row + offset + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores))
            visible = visible & (cols[:, None] <= rows[None, :])
        p = gl.where(visible, p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    delta = rings.stats.index(2 * slot + 1).reshape([BLOCK_M]).load(gl.SliceLayout(0, scores))
    narrow = (p * (dp - delta[None, :])).to(q.dtype)
    weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, grads, 2))
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    rings.ds.index(0).store(narrow)
    fence_async_shared()
    nothing = gl.zeros([BLOCK_M, DIM], gl.float32, queries)
    dq = warpgroup_mma(rings.ds.index(0).permute((1, 0)), k, nothing, use_acc=False, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    mbarrier.arrive(rings.dout.empty.index(slot), count=1)
    left = gl.convert_layout(narrow, gl.DotOperandLayout(0, grads, 2))
    dk = warpgroup_mma(left, q, dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.wait(rings.dq.empty.index(0), (use & 1) ^ 1)
    rings.dq.buffers.index(0).store(dq)
    mbarrier.arrive(rings.dq.full.index(0), count=1)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(rings.q.empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def _store_keys(plane, sums, b, head, row, end, mode: gl.constexpr):
    """Stores the rows before ``end`` of a sum as the products left it: by way of shared memory ptxas spills."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, mode.dim, 16])
    rows = row + gl.arange(0, mode.block_n, gl.SliceLayout(1, layout))
    dims = gl.arange(0, mode.dim, gl.SliceLayout(0, layout))
    # Strides of 16-bit numbers whose rows begin at multiples of 16 bytes, which Triton cannot know.
    start = plane.ptr + b.to(gl.int64) * (plane.batch // 8 * 8) + head.to(gl.int64) * (plane.head // 8 * 8)
    at = rows.to(gl.int64)[:, None] * (plane.row // 8 * 8) + dims[None, :]
    gl.store(start + at, sums.to(plane.ptr.dtype.element_ty), mask=(rows < end)[:, None])


@gluon.jit
def multiply(rings, work, sizes, grads, unit, scale, mode: gl.constexpr):
    """The two warpgroups that compute: dk and dv stay in registers, dq goes to the adding warps."""
    BLOCK_M: gl.constexpr = mode.block_m
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, DIM, 16])
    plane, first = key_tile(work, mode)
    offset, runs = query_runs(first, work, sizes, mode)
    begin, edge, end = runs
    dk = gl.zeros([BLOCK_N, DIM], gl.float32, layout)
    dv = gl.zeros([BLOCK_N, DIM], gl.float32, layout)
    mbarrier.wait(rings.k.full.index(0), 0)
    mbarrier.wait(rings.v.full.index(0), 0)
    # Heads one after the other, in one loop: two in each other take two registers more.
    row = begin * BLOCK_M
    masked = sizes.group * (edge - begin)
    for use in range(masked):
        dk, dv = _step(dk, dv, rings, use, first, row, sizes.cols, offset, unit, MASKED=True, mode=mode)
        row += BLOCK_M
        if row == edge * BLOCK_M:
            row = begin * BLOCK_M
    for use in range(masked, sizes.group * (end - begin)):
        dk, dv = _step(dk, dv, rings, use, first, 0, sizes.cols, offset, unit, MASKED=False, mode=mode)
    # Not before the loops, where it would take a register.
    b, head_kv = head_of(plane, work)
    _store_keys(grads.dv, dv, b, head_kv, first, sizes.cols, mode=mode)
    _store_keys(grads.dk, dk * scale, b, head_kv, first, sizes.cols, mode=mode)


@gluon.jit
def add(rings, work, sizes, sums, mode: gl.constexpr):
    """The adding warps: each tile's part of dq goes to the sums in global memory."""
    BLOCK_M: gl.constexpr = mode.block_m
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // DIM, DIM // 4], [2, 1], [1, 0])
    plane, first = key_tile(work, mode)
    b, head_kv = head_of(plane, work)
    offset, runs = query_runs(first, work, sizes, mode)
    rows = gl.arange(0, PART, gl.SliceLayout(1, layout))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    at = rows[:, None] * DIM + dims[None, :]
    # What the loops need, in few numbers: with more than 40 registers a thread they would spill.
    start = (b * sizes.heads + head_kv * sizes.group) * work.query_tiles
    most = (sizes.cols - 1) // BLOCK_N - first // BLOCK_N
    lead = BLOCK_M - 1 + offset - first
    phase = 0
    for number in range(2):
        low, high = run_of(runs, number)
        head = start
        for _ in range(sizes.group):
            for tile in range(low, high):
                slot = head + tile
                mbarrier.wait(rings.dq.full.index(0), phase)
                if mode.ordered:
                    # The key tiles after this one up to the last column that a row of the tile sees, were it full.
                    before = most
                    if mode.causal:
                        before = gl.minimum((tile * BLOCK_M + lead) // BLOCK_N, most)
                    while gl.atomic_add(sums.turns + slot, 0, sem="acquire") != before:
                        pass
                to = sums.dq + slot.to(gl.int64) * (BLOCK_M * DIM)
                for part in gl.static_range(BLOCK_M // PART):
                    x = rings.dq.buffers.index(0).slice(part * PART, PART, dim=0).load(layout)
                    gl.atomic_add(to + part * PART * DIM + at, x, sem="relaxed")
                    # ptxas would load many parts at once, and spill.
                    group_barrier()
                mbarrier.arrive(rings.dq.empty.index(0), count=1)
                if mode.ordered:
                    group_barrier()
                    gl.atomic_add(sums.turns + slot, 1, sem="release")
                phase ^= 1
            head += work.query_tiles


keyed(add)
