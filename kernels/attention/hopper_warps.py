"""The parts of the Hopper attention forward: which tile a program takes when, the producer and the consumers.

Three groups of warps share a program: one warp that copies (the tensor memory accelerator fills shared memory) and two
warpgroups of 64 query rows each that compute. They meet at mbarriers in shared memory, a full and an empty one for each
buffer. Use number i of a ring of STAGES buffers takes buffer i % STAGES; it is full when the full barrier has completed
i // STAGES + 1 phases, and may be filled when the empty barrier has completed i // STAGES.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launch import keyed
from .online_softmax import row_results
from .scores import column_range, locate

# Triton 3.7 has the copy under a new name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# Query rows of a consumer; a program has two.
ROWS = gl.constexpr(64)


class HopperWork(NamedTuple):
    """The items, each a row tile of a plane, of which a program takes at most ``rounds``.

    A plane is sequence * heads + head; of packed sequences it is the head. Planes come in sections of 2^bits, whose
    keys and values fit in the L2 cache together. A plane has ``tiles`` row tiles; packed: an upper bound.
    """

    rounds: int
    items: int
    tiles: int
    planes: int
    bits: int


class HopperMode(NamedTuple):
    """Constants of the kernel. ``stages`` is the number of buffers in each ring of key and value tiles."""

    packed: bool
    causal: bool
    bottom_right: bool
    ping_pong: bool
    block_n: int
    dim: int
    stages: int


class HopperResults(NamedTuple):
    """Where a consumer stores: the output, and per row lse and the two statistics."""

    out: torch.Tensor
    lse: torch.Tensor
    stats: torch.Tensor


class Ring(NamedTuple):
    """In a kernel: buffers of shared memory, and the barriers that say which are full and which empty."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def turn_of(round, program, n_programs):
    """What a persistent program takes in its round-th turn: every second row of programs runs backwards.

    Where the work shrinks from item to item, each pair of rounds gives every program about the same.
    """
    place = program
    if round % 2 == 1:
        place = n_programs - 1 - program
    return round * n_programs + place


@gluon.jit
def work_item(item, work, sizes, mode: gl.constexpr):
    """Tile number ``item``: (serves, plane, b, head, first row, n_rows, n_cols, offset, start_q, start_k, steps, full).

    ``steps`` column tiles are visible, the first ``full`` of them to every row. Within a section of planes the tiles
    with the most columns come first.
    """
    slot = (item >> work.bits) % work.tiles
    plane = ((item >> work.bits) // work.tiles << work.bits) + (item & ((1 << work.bits) - 1))
    if mode.packed:
        _, tile, start_q, n_rows, start_k, n_cols = locate(
            slot, sizes.cu_q, sizes.cu_k, work.tiles, sizes.rows, sizes.cols, sizes.sequences, BLOCK=2 * ROWS
        )
        start_q = start_q.to(gl.int32)
        start_k = start_k.to(gl.int32)
    else:
        # Divisions cost registers in every partition: ptxas keeps their reciprocals.
        tile = slot
        start_q, n_rows, start_k, n_cols = slot * 0, sizes.rows, slot * 0, sizes.cols
    if mode.causal:
        tile = gl.cdiv(n_rows, 2 * ROWS) - 1 - tile
    b = plane * 0
    head = plane
    if not mode.packed:
        b = plane // sizes.heads
        head = plane - b * sizes.heads
    first = tile * (2 * ROWS)
    serves = (tile >= 0) & (first < n_rows) & (plane < work.planes)
    last = gl.minimum(first + 2 * ROWS, n_rows) - 1
    offset = n_cols - n_rows if mode.bottom_right else 0
    right: gl.constexpr = 0 if mode.causal else None
    _, _, full_end, end = column_range(first, last, n_cols, offset, None, right, BLOCK_N=mode.block_n)
    steps = gl.cdiv(end, mode.block_n)
    full = full_end // mode.block_n
    return serves, plane, b, head, first, n_rows, n_cols, offset, start_q, start_k, steps, full


@gluon.jit
def _load(desc, plane, row, ring, use, STAGES: gl.constexpr):
    """Fills the ring's buffer for use number ``use`` from ``row`` of ``plane`` on, once it is empty."""
    slot = use % STAGES
    mbarrier.wait(ring.empty.index(slot), (use // STAGES & 1) ^ 1)
    b, head = plane
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes)
    async_load(desc, [b, head, row, 0], ring.full.index(slot), ring.buffers.index(slot))


@gluon.jit
def produce(descs, q, k, v, work, sizes, mode: gl.constexpr):
    """The copying warp: q of each tile, then its keys and values from the right, keys one step ahead."""
    q_desc, k_desc, v_desc = descs
    STAGES: gl.constexpr = mode.stages
    BLOCK_N: gl.constexpr = mode.block_n
    served = 0
    done = 0
    for round in range(work.rounds):
        item = turn_of(round, gl.program_id(0), gl.num_programs(0))
        if item < work.items:
            serves, _, b, head, first, _, _, _, start_q, start_k, steps, _ = work_item(item, work, sizes, mode)
            if serves & (steps > 0):
                for half in gl.static_range(2):
                    mbarrier.wait(q.empty.index(half), (served & 1) ^ 1)
                    mbarrier.expect(q.full.index(half), q_desc.block_type.nbytes)
                    row = start_q + first + half * ROWS
                    async_load(q_desc, [b, head, row, 0], q.full.index(half), q.buffers.index(half))
                served += 1
                plane = (b, head // sizes.group)
                last = start_k + (steps - 1) * BLOCK_N
                _load(k_desc, plane, last, k, done, STAGES=STAGES)
                for step in range(1, steps):
                    _load(k_desc, plane, last - step * BLOCK_N, k, done + step, STAGES=STAGES)
                    row = last - (step - 1) * BLOCK_N
                    _load(v_desc, plane, row, v, done + step - 1, STAGES=STAGES)
                _load(v_desc, plane, start_k, v, done + steps - 1, STAGES=STAGES)
                done += steps


@gluon.jit
def _online(s, row_max, row_sum, unit):
    """(p, row_max, row_sum, alpha) after the scores ``s``: what was summed before is to be scaled by alpha."""
    new_max = gl.maximum(row_max, gl.max(s, 1))
    # A row that has seen nothing yet keeps -inf, and -inf - -inf would be NaN.
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    alpha = gl.exp2((row_max - shift) * unit)
    p = gl.exp2(s * unit - (shift * unit)[:, None])
    return p, new_max, row_sum * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _clear_tail(v, begin, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    """Zeroes the rows of ``v`` from ``begin`` on: another sequence's, whose inf or NaN would survive p = 0.

    Both consumers do so, each before its own product: they write the same zeros.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    v.store(gl.where((rows < begin)[:, None], v.load(layout), 0.0).to(v.dtype))
    fence_async_shared()


@gluon.jit
def _step(
    acc, p, row_max, row_sum, q_tile, k, v, turns, use, turn, col, limit, unit,
    HALF: gl.constexpr, MASKED: gl.constexpr, mode: gl.constexpr,
):  # fmt: skip
    """One more column tile, from ``col`` on: its scores are issued before the product of the step before.

    The tensor cores compute ``p`` times the values of use - 1 while this warpgroup turns the new scores into the next
    ``p``. With ``ping_pong`` the two consumers also take turns in issuing, so that one's exponentials fall into the
    other's products.
    """
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    STAGES: gl.constexpr = mode.stages
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    slot = use % STAGES
    before = (use - 1) % STAGES
    mbarrier.wait(k.full.index(slot), use // STAGES & 1)
    if mode.ping_pong:
        mbarrier.wait(turns.index(HALF), (turn & 1) ^ (1 - HALF))
    k_tile = k.buffers.index(slot).reshape([BLOCK_N, DIM])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
    s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v.full.index(before), (use - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v.buffers.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
    if mode.ping_pong:
        mbarrier.arrive(turns.index(1 - HALF), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k.empty.index(slot), count=1)
    if MASKED:
        cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
        s = gl.where(cols[None, :] <= limit[:, None], s, float("-inf"))
    weights, row_max, row_sum, alpha = _online(s, row_max, row_sum, unit)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v.empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, output))[:, None]
    p = gl.convert_layout(weights.to(k.buffers.dtype), gl.DotOperandLayout(0, output, 2))
    return acc, p, row_max, row_sum


@gluon.jit
def consume(q, k, v, turns, work, sizes, results, unit, HALF: gl.constexpr, mode: gl.constexpr):
    """A computing warpgroup: rows HALF * ROWS .. of each tile."""
    BLOCK_N: gl.constexpr = mode.block_n
    DIM: gl.constexpr = mode.dim
    STAGES: gl.constexpr = mode.stages
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_tile = q.buffers.index(HALF).reshape([ROWS, DIM])
    served = 0
    done = 0
    turn = 0
    for round in range(work.rounds):
        item = turn_of(round, gl.program_id(0), gl.num_programs(0))
        if item < work.items:
            serves, plane, b, head, first, n_rows, n_cols, offset, start_q, _, steps, full = work_item(
                item, work, sizes, mode
            )
            if serves:
                first += HALF * ROWS
                rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
                # The last column that each row sees.
                limit = rows * 0 + (n_cols - 1)
                if mode.causal:
                    limit = gl.minimum(rows + offset, n_cols - 1)
                acc = gl.zeros([ROWS, DIM], gl.float32, output)
                row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
                row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
                if steps > 0:
                    slot = done % STAGES
                    if mode.packed:  # noqa: SIM102
                        # Dense tiles end in the zeros that the copy fills in past the last row.
                        if steps * BLOCK_N > n_cols:
                            mbarrier.wait(v.full.index(slot), done // STAGES & 1)
                            v_tile = v.buffers.index(slot).reshape([BLOCK_N, DIM])
                            _clear_tail(v_tile, n_cols - (steps - 1) * BLOCK_N, BLOCK_N=BLOCK_N, DIM=DIM)
                    mbarrier.wait(q.full.index(HALF), served & 1)
                    mbarrier.wait(k.full.index(slot), done // STAGES & 1)
                    k_tile = k.buffers.index(slot).reshape([BLOCK_N, DIM])
                    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
                    s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(0, deps=[s])
                    mbarrier.arrive(k.empty.index(slot), count=1)
                    last = (steps - 1) * BLOCK_N
                    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
                    s = gl.where(cols[None, :] <= (limit - last)[:, None], s, float("-inf"))
                    weights, row_max, row_sum, _alpha = _online(s, row_max, row_sum, unit)
                    p = gl.convert_layout(weights.to(k.buffers.dtype), gl.DotOperandLayout(0, output, 2))
                    if mode.causal:
                        for step in range(1, steps - full):
                            acc, p, row_max, row_sum = _step(
                                acc, p, row_max, row_sum, q_tile, k, v, turns, done + step, turn + step - 1,
                                (steps - 1 - step) * BLOCK_N, limit, unit, HALF=HALF, MASKED=True, mode=mode,
                            )  # fmt: skip
                    for step in range(gl.maximum(steps - full, 1), steps):
                        acc, p, row_max, row_sum = _step(
                            acc, p, row_max, row_sum, q_tile, k, v, turns, done + step, turn + step - 1,
                            (steps - 1 - step) * BLOCK_N, limit, unit, HALF=HALF, MASKED=False, mode=mode,
                        )  # fmt: skip
                    mbarrier.arrive(q.empty.index(HALF), count=1)
                    served += 1
                    done += steps
                    turn += steps - 1
                    slot = (done - 1) % STAGES
                    mbarrier.wait(v.full.index(slot), (done - 1) // STAGES & 1)
                    v_tile = v.buffers.index(slot).reshape([BLOCK_N, DIM])
                    acc = warpgroup_mma(p, v_tile, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(v.empty.index(slot), count=1)
                lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, unit, NATURAL=False)
                at = plane.to(gl.int64) * sizes.rows + start_q + rows
                gl.store(results.lse + at, lse, mask=rows < n_rows)
                gl.store(results.stats + at, row_max, mask=rows < n_rows)
                at_log2 = (plane.to(gl.int64) + work.planes) * sizes.rows + start_q + rows
                gl.store(results.stats + at_log2, row_log2, mask=rows < n_rows)
                acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, output))[:, None]
                result = gl.convert_layout(acc.to(results.out.dtype.element_ty), memory)
                row = first + gl.arange(0, ROWS, gl.SliceLayout(1, memory))
                dim = gl.arange(0, DIM, gl.SliceLayout(0, memory))
                token = (b * sizes.rows + start_q + row).to(gl.int64)
                at = (token * sizes.heads + head)[:, None] * DIM + dim[None, :]
                gl.store(results.out + at, result, mask=(row < n_rows)[:, None])


keyed(work_item, produce, _step, consume)
