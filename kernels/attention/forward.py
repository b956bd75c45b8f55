"""Attention forward, after FlashAttention-2 (Dao 2023): one program per tile of query rows, online softmax.

    t = q k^T * scale [soft-capped, + ALiBi, + bias], masked;  p = softmax(t) [with the sink in its denominator]
    out = dropout(p) v,  lse = log sum exp t

Column tiles that every row of the tile sees run without a mask; those at the edges run in loops of their own. Rows
that see nothing give 0 and lse = -inf. Accumulation is fp32; p is rounded to v's dtype for the second product.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS
from .decode import attention_decode, splits
from .online_softmax import forward_tiles, row_results
from .problem import Problem, column_range, load_tile, locate, plane_of, store_tile
from .tiles import forward_tile


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, max_ptr, log2_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_sb, stride_sh, cu_q_ptr, cu_k_ptr,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, left, right, seed_ptr, threshold, keep_scale,
    n_programs, n_tiles, n_seqs, heads, group, length_q, length_k, dim, dim_v,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    SINKS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, SPLIT_FROM: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // n_programs).to(tl.int64)
    b, tile, start_q, n_rows, start_k, n_cols = locate(
        program % n_programs, cu_q_ptr, cu_k_ptr, n_tiles, length_q, length_k, n_seqs, BLOCK=BLOCK_M, PACKED=PACKED
    )
    if RIGHT:
        # The last rows see the most columns: they start first, so that the short programs fill the end.
        tile = tl.cdiv(n_rows, BLOCK_M) - 1 - tile
    serves = (tile >= 0) & (tile * BLOCK_M < n_rows)
    if SPLIT_ROWS > 0:
        # Those are attention_decode's.
        serves = serves & ((n_rows > SPLIT_ROWS) | (n_cols < SPLIT_FROM))
    if serves:
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        dv = tl.arange(0, BLOCK_DV).to(tl.int64)
        head_kv = head // group
        q_ptr = plane_of(q_ptr, b, head, start_q, stride_qb, stride_qh, stride_qm, ALIGN=ALIGN)
        k_ptr = plane_of(k_ptr, b, head_kv, start_k, stride_kb, stride_kh, stride_kn, ALIGN=ALIGN)
        v_ptr = plane_of(v_ptr, b, head_kv, start_k, stride_vb, stride_vh, stride_vn, ALIGN=ALIGN)
        q = load_tile(q_ptr, rows, in_rows, stride_qm, d, stride_qd, dim, ALIGN=ALIGN)
        if BIAS > 0:
            bias_ptr += b * stride_bb + head * stride_bh
        slope = tl.load(slopes_ptr + b * stride_ab + head * stride_ah).to(tl.float32) if ALIBI else 0.0
        seed = tl.load(seed_ptr) if DROPOUT else 0
        plane = b * heads + head
        offset = n_cols - n_rows if BOTTOM_RIGHT else 0
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        if SINKS:
            # The sink is a column without a value: the running sum starts with it.
            row_max = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32)
            row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
        begin, full_begin, full_end, end = column_range(
            first, last, n_cols, offset, left, right, BLOCK_N=BLOCK_N, LEFT=LEFT, RIGHT=RIGHT
        )
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            if phase > 0 or LEFT:
                acc, row_max, row_sum = forward_tiles(
                    acc, row_max, row_sum, q, k_desc, v_desc, b, head_kv, k_ptr, v_ptr, low, high, rows, n_rows, n_cols,
                    stride_kn, stride_kd, stride_vn, stride_vd, d, dv, dim, dim_v,
                    bias_ptr, stride_bm, stride_bn, slope, scale, softcap, unit, offset, left, right,
                    seed, plane, threshold,
                    NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT,
                    DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=EXACT, MASKED=phase != 1, ALIGN=ALIGN, BLOCK_N=BLOCK_N,
                )  # fmt: skip
        lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, unit, NATURAL=NATURAL)
        acc = acc / row_sum[:, None]
        if DROPOUT:
            acc *= keep_scale
        at_stats = b * stride_sb + head * stride_sh + start_q + rows
        tl.store(lse_ptr + at_stats, lse, mask=in_rows)
        tl.store(max_ptr + at_stats, row_max, mask=in_rows)
        tl.store(log2_ptr + at_stats, row_log2, mask=in_rows)
        out_ptr = plane_of(out_ptr, b, head, start_q, stride_ob, stride_oh, stride_om, ALIGN=ALIGN)
        store_tile(out_ptr, acc, rows, in_rows, stride_om, dv, stride_od, dim_v, ALIGN=ALIGN)


def attention_fwd(q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right,
                  dropout_p, out):  # fmt: skip
    """Fills ``out``; returns lse, and the statistics for the backward: (2, *lse.shape), row maxima and log2 of sums."""
    problem = Problem(
        q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p
    )
    lse = q.new_empty(problem.stats_shape(), dtype=torch.float32)
    stats = q.new_empty((2, *problem.stats_shape()), dtype=torch.float32)
    if lse.numel() == 0:
        return lse, stats
    if problem.packed:
        # Rows past the last sequence have no program; they count as rows that see nothing.
        lse.fill_(-torch.inf)
        stats[0].zero_()
        stats[1].fill_(torch.inf)
    limits = splits(problem)
    if limits is not None:
        attention_decode(problem, limits, sinks, out, lse, stats)
        if not problem.packed:
            return lse, stats
    tile = problem.fit(forward_tile(problem.widest, q.dtype, problem.arch, problem.load), "BLOCK_M", problem.rows)
    n_tiles, programs = problem.tiles(tile["BLOCK_M"], problem.rows)
    copies = problem.descriptors(k, v, tile["BLOCK_N"], *problem.blocks.values())
    _attention_fwd_kernel[(programs * problem.heads,)](
        q, k, v, *copies, out, lse, stats[0], stats[1], q if sinks is None else sinks,
        *(s for x in (q, k, v, out) for s in problem.strides(x)), *problem.stat_strides(), *problem.cu,
        *problem.bias_args(), *problem.slope_args(), *problem.feature_args(), problem.keep_scale,
        programs, n_tiles, problem.batch, problem.heads, problem.group, problem.rows, problem.cols,
        problem.dim, problem.dim_v, SINKS=sinks is not None, **(limits or dict(SPLIT_ROWS=0, SPLIT_FROM=0)),
        ALIGN=problem.align(out), **problem.flags, **problem.blocks, **tile, **OPTIONS,
    )  # fmt: skip
    return lse, stats
