"""What the attention forwards share: the walk over column tiles, and what a row's maximum and sum come to."""

import triton
import triton.language as tl

from ..launch import keyed
from .scores import LN2, kept, scores, step_tile


@triton.jit
def forward_tiles(
    acc, row_max, row_sum, q, rows, keys, values, k_desc, v_desc, run, sheet, score, dropout,
    flags: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(acc, row_max, row_sum) after the column tiles of ``run``, (begin, end): the online softmax.

    ``k_desc`` and ``v_desc`` are descriptors of the dense tensors of ``keys`` and ``values``, or None.
    """
    begin, end = run
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = step_tile(k_desc, keys, start, cols, sheet.n_cols)
        dot = tl.dot(q, tl.trans(k), input_precision=flags.precision)
        t, _ = scores(dot, rows[:, None], cols[None, :], sheet, score, flags, MASKED=MASKED)
        new_max = tl.maximum(row_max, tl.max(t, axis=1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - shift) * score.unit)
        if flags.exact:
            p = tl.exp2((t - shift[:, None]) * score.unit)
        else:
            p = tl.exp2(t * score.unit - (shift * score.unit)[:, None])
        row_sum = row_sum * alpha + tl.sum(p, axis=1)
        row_max = new_max
        if dropout is not None:
            p = tl.where(kept(sheet.seed, sheet.number, rows, start, dropout.threshold, BLOCK_N), p, 0.0)
        v = step_tile(v_desc, values, start, cols, sheet.n_cols)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=flags.precision)
    return acc, row_max, row_sum


@triton.jit
def row_results(row_max, row_sum, unit, NATURAL: tl.constexpr):
    """(lse, row_max, row_sum, row_log2) of finished rows; those that saw nothing: -inf, 0, 1 and inf."""
    empty = row_max == float("-inf")
    row_max = tl.where(empty, 0.0, row_max)
    row_sum = tl.where(empty, 1.0, row_sum)
    row_log2 = tl.log2(row_sum)
    # A logit near the least float32 must not pass through log2 units, where it would overflow.
    lse = row_max + row_log2 * LN2 if NATURAL else (row_max * unit + row_log2) * LN2
    lse = tl.where(empty, float("-inf"), lse)
    return lse, row_max, row_sum, tl.where(empty, float("inf"), row_log2)


keyed(row_results, forward_tiles)
