"""What the attention forwards share: the walk over column tiles, and what a row's maximum and sum come to."""

import triton
import triton.language as tl

from .problem import LN2, kept, scores, step_tile


@triton.jit
def forward_tiles(
    acc, row_max, row_sum, q, k_desc, v_desc, b, head_kv, k_ptr, v_ptr, begin, end, rows, n_rows, n_cols,
    stride_kn, stride_kd, stride_vn, stride_vd, d, dv, dim, dim_v,
    bias_ptr, stride_bm, stride_bn, slope, scale, softcap, unit, offset, left, right, seed, plane, threshold,
    NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(acc, row_max, row_sum) after the column tiles begin .. end: the online softmax.

    ``k_desc`` and ``v_desc`` are descriptors of the dense tensors, whose plane is (b, head_kv), or None. ``slope`` is a
    scalar or one per row, (rows, 1); so are ``plane`` and the bias's pointer.
    """
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = step_tile(k_desc, b, head_kv, start, k_ptr, cols, n_cols, stride_kn, d, stride_kd, dim, ALIGN=ALIGN)
        t, _ = scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], cols[None, :], n_rows, n_cols,
            bias_ptr, stride_bm, stride_bn, slope, scale, softcap, offset, left, right,
            NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT, MASKED=MASKED,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(t, axis=1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - shift) * unit)
        p = tl.exp2((t - shift[:, None]) * unit) if EXACT else tl.exp2(t * unit - (shift * unit)[:, None])
        row_sum = row_sum * alpha + tl.sum(p, axis=1)
        row_max = new_max
        if DROPOUT:
            p = tl.where(kept(seed, plane, rows, start, threshold, BLOCK_N), p, 0.0)
        v = step_tile(v_desc, b, head_kv, start, v_ptr, cols, n_cols, stride_vn, dv, stride_vd, dim_v, ALIGN=ALIGN)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
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
