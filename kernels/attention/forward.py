"""Attention forward, after FlashAttention-2 (Dao 2023): one program per tile of query rows, online softmax.

    t = q k^T * scale [soft-capped, + ALiBi, + bias], masked;  p = softmax(t) [with the sink in its denominator]
    out = dropout(p) v,  lse = log sum exp t

Column tiles that every row of the tile sees run without a mask; those at the edges run in loops of their own. Rows
that see nothing give 0 and lse = -inf. Accumulation is fp32; p is rounded to v's dtype for the second product.
"""

import triton
import triton.language as tl

from .decode import attention_decode, splits
from .online_softmax import forward_tiles, row_results
from .problem import Problem
from .scores import column_range, first_number, load_tile, locate, matrix_of, sheet_of, store_tile
from .tiles import forward_tile


@triton.jit
def _attention_fwd_kernel(
    q, k, v, k_desc, v_desc, out, stats, sinks, score, dropout, sizes, programs,
    flags: tl.constexpr, tile: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_DV: tl.constexpr = tile.block_dv
    program = tl.program_id(0)
    head = (program // programs.per_head).to(tl.int64)
    b, at, start_q, n_rows, start_k, n_cols = locate(
        program % programs.per_head, sizes.cu_q, sizes.cu_k, programs.tiles, sizes.rows, sizes.cols, sizes.sequences,
        BLOCK=BLOCK_M,
    )  # fmt: skip
    if score.right is not None:
        # The last rows see the most columns: they start first, so that the short programs fill the end.
        at = tl.cdiv(n_rows, BLOCK_M) - 1 - at
    serves = (at >= 0) & (at * BLOCK_M < n_rows)
    if split is not None:
        # The others are attention_decode's.
        serves = serves & ((n_rows > split.rows) | (n_cols < split.least_cols))
    if serves:
        first = at * BLOCK_M
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        head_kv = head // sizes.group
        queries = matrix_of(q, b, head, start_q, sizes.dim, BLOCK=tile.block_d, ALIGN=flags.align)
        keys = matrix_of(k, b, head_kv, start_k, sizes.dim, BLOCK=tile.block_d, ALIGN=flags.align)
        values = matrix_of(v, b, head_kv, start_k, sizes.dim_v, BLOCK=BLOCK_DV, ALIGN=flags.align)
        q_tile = load_tile(queries, rows, in_rows)
        seed = tl.load(dropout.seed) if dropout is not None else 0
        number = first_number(dropout, b, sizes.heads)
        sheet = sheet_of(b, head, n_rows, n_cols, score, seed, number, BOTTOM_RIGHT=flags.bottom_right)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        if sinks is not None:
            # The sink is a column without a value: the running sum starts with it.
            row_max = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + head).to(tl.float32)
            row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
        begin, full_begin, full_end, end = column_range(
            first, last, n_cols, sheet.offset, score.left, score.right, BLOCK_N=tile.block_n
        )
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            # Without a left bound the first run is empty.
            if phase > 0 or score.left is not None:
                acc, row_max, row_sum = forward_tiles(
                    acc, row_max, row_sum, q_tile, rows, keys, values, k_desc, v_desc, (low, high), sheet, score,
                    dropout, flags, MASKED=phase != 1, BLOCK_N=tile.block_n,
                )  # fmt: skip
        lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, score.unit, NATURAL=flags.natural)
        acc = acc / row_sum[:, None]
        if dropout is not None:
            acc *= dropout.keep_scale
        at_stats = b * stats.batch + head * stats.head + start_q + rows
        tl.store(stats.lse + at_stats, lse, mask=in_rows)
        tl.store(stats.row_max + at_stats, row_max, mask=in_rows)
        tl.store(stats.row_log2 + at_stats, row_log2, mask=in_rows)
        outputs = matrix_of(out, b, head, start_q, sizes.dim_v, BLOCK=BLOCK_DV, ALIGN=flags.align)
        store_tile(outputs, acc, rows, in_rows)


def attention_fwd(call, out):
    """Fills ``out``; returns lse, and the statistics for the backward: (2, *lse.shape), row maxima and log2 of sums.

    ``call`` is described at :class:`.problem.Problem`.
    """
    problem = Problem(call)
    lse, stats = problem.new_statistics()
    if lse.numel() == 0:
        return lse, stats
    statistics = problem.statistics(stats, lse=lse)
    split = splits(problem)
    if split is not None:
        attention_decode(problem, split, out, statistics)
        if not problem.packed:
            return lse, stats
    tile = forward_tile(problem.widest, problem.q.dtype, problem.arch, problem.pressure)
    shape, options = problem.launch_of("attention_fwd", tile)
    programs = problem.programs(shape.block_m, problem.rows)
    _attention_fwd_kernel[(programs.per_head * problem.heads,)](
        *map(problem.plane, (problem.q, problem.k, problem.v)),
        *problem.descriptors(problem.k, problem.v, shape.block_n),
        problem.plane(out), statistics, problem.sinks, problem.score, problem.dropout, problem.sizes, programs,
        flags=problem.flags(out), tile=shape, split=split, **options,
    )  # fmt: skip
    return lse, stats
