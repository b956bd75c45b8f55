"""The parts of the Hopper attention forward: which tile a program takes when, the producer and the consumers.

Three groups of warps share a program: one warp that copies (the tensor memory accelerator fills shared memory) and two
warpgroups of 64 query rows each that compute. They meet at mbarriers in shared memory, a full and an empty one for each
buffer. Use number i of a ring of STAGES buffers takes buffer i % STAGES; it is full when the full barrier has completed
i // STAGES + 1 phases, and may be filled when the empty barrier has completed i // STAGES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .online_softmax import row_results
from .problem import column_range, locate

# Triton 3.7 has the copy under a new name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# Query rows of a consumer; a program has two.
ROWS = gl.constexpr(64)


@gluon.jit
def turn_of(round, program, n_programs):
    """What a persistent program takes in its round-th turn: every second row of programs runs backwards.

    Where the work shrinks from item to item, each pair of rounds gives every program about the same.
    """
    ahead = program
    if round % 2 == 1:
        ahead = n_programs - 1 - program
    return round * n_programs + ahead


@gluon.jit
def row_tile(
    item, sizes, cu_q_ptr, cu_k_ptr,
    PACKED: gl.constexpr, CAUSAL: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Tile number ``item``: (serves, plane, b, head, first row, n_rows, n_cols, offset, start_q, start_k, steps, full).

    ``steps`` column tiles are visible, the first ``full`` of them to every row. The planes, sequence * heads + head or
    the heads of packed sequences, come in sections of 2^bits, whose keys and values fit in the L2 cache together;
    within a section the tiles with the most columns come first.
    """
    _, _, n_tiles, planes, bits, n_seqs, heads, length_q, length_k = sizes
    slot = (item >> bits) % n_tiles
    plane = ((item >> bits) // n_tiles << bits) + (item & ((1 << bits) - 1))
    if PACKED:
        _, tile, start_q, n_rows, start_k, n_cols = locate(
            slot, cu_q_ptr, cu_k_ptr, n_tiles, length_q, length_k, n_seqs, BLOCK=2 * ROWS, PACKED=True
        )  # fmt: skip
        start_q = start_q.to(gl.int32)
        start_k = start_k.to(gl.int32)
    else:
        # Divisions cost registers in every partition: ptxas keeps their reciprocals.
        tile = slot
        start_q, n_rows, start_k, n_cols = slot * 0, length_q, slot * 0, length_k
    if CAUSAL:
        tile = gl.cdiv(n_rows, 2 * ROWS) - 1 - tile
    b = plane * 0
    head = plane
    if not PACKED:
        b = plane // heads
        head = plane - b * heads
    first = tile * (2 * ROWS)
    serves = (tile >= 0) & (first < n_rows) & (plane < planes)
    last = gl.minimum(first + 2 * ROWS, n_rows) - 1
    offset = n_cols - n_rows if BOTTOM_RIGHT else 0
    _, _, full_end, end = column_range(first, last, n_cols, offset, 0, 0, BLOCK_N=BLOCK_N, LEFT=False, RIGHT=CAUSAL)
    steps = gl.cdiv(end, BLOCK_N)
    full = full_end // BLOCK_N
    return serves, plane, b, head, first, n_rows, n_cols, offset, start_q, start_k, steps, full


@gluon.jit
def _load(desc, plane, row, bars, buffers, use, STAGES: gl.constexpr):
    """Fills the ring's buffer for use number ``use`` from ``row`` of ``plane`` on, once it is empty."""
    full, empty = bars
    slot = use % STAGES
    mbarrier.wait(empty.index(slot), (use // STAGES & 1) ^ 1)
    b, head = plane
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    async_load(desc, [b, head, row, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def produce(
    descs, buffers, bars, sizes, group, cu_q_ptr, cu_k_ptr,
    PACKED: gl.constexpr, CAUSAL: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: q of each tile, then its keys and values from the right, keys one step ahead."""
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    n_rounds, n_items = sizes[0], sizes[1]
    served = 0
    done = 0
    for round in range(n_rounds):
        item = turn_of(round, gl.program_id(0), gl.num_programs(0))
        if item < n_items:
            serves, _, b, head, first, _, _, _, start_q, start_k, steps, _ = row_tile(
                item, sizes, cu_q_ptr, cu_k_ptr,
                PACKED=PACKED, CAUSAL=CAUSAL, BOTTOM_RIGHT=BOTTOM_RIGHT, BLOCK_N=BLOCK_N,
            )  # fmt: skip
            if serves & (steps > 0):
                for half in gl.static_range(2):
                    mbarrier.wait(q_empty.index(half), (served & 1) ^ 1)
                    mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                    row = start_q + first + half * ROWS
                    async_load(q_desc, [b, head, row, 0], q_full.index(half), q_smem.index(half))
                served += 1
                plane = (b, head // group)
                last = start_k + (steps - 1) * BLOCK_N
                _load(k_desc, plane, last, (k_full, k_empty), k_smem, done, STAGES=STAGES)
                for step in range(1, steps):
                    _load(k_desc, plane, last - step * BLOCK_N, (k_full, k_empty), k_smem, done + step, STAGES=STAGES)
                    row = last - (step - 1) * BLOCK_N
                    _load(v_desc, plane, row, (v_full, v_empty), v_smem, done + step - 1, STAGES=STAGES)
                _load(v_desc, plane, start_k, (v_full, v_empty), v_smem, done + steps - 1, STAGES=STAGES)
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
    acc, p, row_max, row_sum, q, bars, turns, k_smem, v_smem, use, turn, col, limit, unit,
    HALF: gl.constexpr, MASKED: gl.constexpr, PING_PONG: gl.constexpr,
    BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One more column tile, from ``col`` on: its scores are issued before the product of the step before.

    The tensor cores compute ``p`` times the values of use - 1 while this warpgroup turns the new scores into the next
    ``p``. With PING_PONG the two consumers also take turns in issuing, so that one's exponentials fall into the
    other's products.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    _, _, k_full, k_empty, v_full, v_empty = bars
    slot = use % STAGES
    before = (use - 1) % STAGES
    mbarrier.wait(k_full.index(slot), use // STAGES & 1)
    if PING_PONG:
        mbarrier.wait(turns.index(HALF), (turn & 1) ^ (1 - HALF))
    k = k_smem.index(slot).reshape([BLOCK_N, DIM])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (use - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turns.index(1 - HALF), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
        s = gl.where(cols[None, :] <= limit[:, None], s, float("-inf"))
    weights, row_max, row_sum, alpha = _online(s, row_max, row_sum, unit)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, output))[:, None]
    p = gl.convert_layout(weights.to(k_smem.dtype), gl.DotOperandLayout(0, output, 2))
    return acc, p, row_max, row_sum


@gluon.jit
def consume(
    buffers, bars, turns, sizes, cu_q_ptr, cu_k_ptr, results, unit,
    HALF: gl.constexpr, PACKED: gl.constexpr, CAUSAL: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    PING_PONG: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: rows HALF * ROWS .. of each tile."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    out_ptr, lse_ptr, stats_ptr = results
    n_rounds, n_items = sizes[0], sizes[1]
    q = q_smem.index(HALF).reshape([ROWS, DIM])
    served = 0
    done = 0
    turn = 0
    for round in range(n_rounds):
        item = turn_of(round, gl.program_id(0), gl.num_programs(0))
        if item < n_items:
            serves, plane, b, head, first, n_rows, n_cols, offset, start_q, _, steps, full = row_tile(
                item, sizes, cu_q_ptr, cu_k_ptr,
                PACKED=PACKED, CAUSAL=CAUSAL, BOTTOM_RIGHT=BOTTOM_RIGHT, BLOCK_N=BLOCK_N,
            )  # fmt: skip
            if serves:
                first += HALF * ROWS
                rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
                # The last column that each row sees.
                limit = rows * 0 + (n_cols - 1)
                if CAUSAL:
                    limit = gl.minimum(rows + offset, n_cols - 1)
                acc = gl.zeros([ROWS, DIM], gl.float32, output)
                row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
                row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
                if steps > 0:
                    slot = done % STAGES
                    if PACKED:  # noqa: SIM102
                        # Dense tiles end in the zeros that the copy fills in past the last row.
                        if steps * BLOCK_N > n_cols:
                            mbarrier.wait(v_full.index(slot), done // STAGES & 1)
                            v = v_smem.index(slot).reshape([BLOCK_N, DIM])
                            _clear_tail(v, n_cols - (steps - 1) * BLOCK_N, BLOCK_N=BLOCK_N, DIM=DIM)
                    mbarrier.wait(q_full.index(HALF), served & 1)
                    mbarrier.wait(k_full.index(slot), done // STAGES & 1)
                    k = k_smem.index(slot).reshape([BLOCK_N, DIM])
                    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
                    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(0, deps=[s])
                    mbarrier.arrive(k_empty.index(slot), count=1)
                    last = (steps - 1) * BLOCK_N
                    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
                    s = gl.where(cols[None, :] <= (limit - last)[:, None], s, float("-inf"))
                    weights, row_max, row_sum, _alpha = _online(s, row_max, row_sum, unit)
                    p = gl.convert_layout(weights.to(k_smem.dtype), gl.DotOperandLayout(0, output, 2))
                    if CAUSAL:
                        for step in range(1, steps - full):
                            acc, p, row_max, row_sum = _step(
                                acc, p, row_max, row_sum, q, bars, turns, k_smem, v_smem, done + step,
                                turn + step - 1, (steps - 1 - step) * BLOCK_N, limit, unit,
                                HALF=HALF, MASKED=True, PING_PONG=PING_PONG,
                                BLOCK_N=BLOCK_N, DIM=DIM, STAGES=STAGES,
                            )  # fmt: skip
                    for step in range(gl.maximum(steps - full, 1), steps):
                        acc, p, row_max, row_sum = _step(
                            acc, p, row_max, row_sum, q, bars, turns, k_smem, v_smem, done + step,
                            turn + step - 1, (steps - 1 - step) * BLOCK_N, limit, unit,
                            HALF=HALF, MASKED=False, PING_PONG=PING_PONG,
                            BLOCK_N=BLOCK_N, DIM=DIM, STAGES=STAGES,
                        )  # fmt: skip
                    mbarrier.arrive(q_empty.index(HALF), count=1)
                    served += 1
                    done += steps
                    turn += steps - 1
                    slot = (done - 1) % STAGES
                    mbarrier.wait(v_full.index(slot), (done - 1) // STAGES & 1)
                    v = v_smem.index(slot).reshape([BLOCK_N, DIM])
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    mbarrier.arrive(v_empty.index(slot), count=1)
                lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, unit, NATURAL=False)
                _, _, _, planes, _, _, heads, length_q, _ = sizes
                at = plane.to(gl.int64) * length_q + start_q + rows
                gl.store(lse_ptr + at, lse, mask=rows < n_rows)
                gl.store(stats_ptr + at, row_max, mask=rows < n_rows)
                gl.store(stats_ptr + planes.to(gl.int64) * length_q + at, row_log2, mask=rows < n_rows)
                acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, output))[:, None]
                result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), memory)
                row = first + gl.arange(0, ROWS, gl.SliceLayout(1, memory))
                dim = gl.arange(0, DIM, gl.SliceLayout(0, memory))
                token = (b * length_q + start_q + row).to(gl.int64)
                at = (token * heads + head)[:, None] * DIM + dim[None, :]
                gl.store(out_ptr + at, result, mask=(row < n_rows)[:, None])
