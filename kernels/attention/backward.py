"""Attention backward, after FlashAttention-2 (Dao 2023, algorithm 2), without atomics.

    p = softmax(t),  dp = dropout(dout v^T),  ds = p * (dp - delta),  delta = sum(dout * out) - dlse
    dt = ds * (1 - tanh^2) if soft-capped;  dq = scale dt k,  dk = scale dt^T q,  dv = dropout(p)^T dout
    dbias = ds summed over the bias's broadcast dimensions,  dsink = -sum over rows of exp(sink - lse) * delta

Scores are recomputed: by one program per tile of keys for dk and dv, which walks the query heads of its group, so
that grouped gradients need no second pass; and by one per tile of queries for dq. A bias's gradient is a third pass.
Every sum has a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS
from .bias_gradient import attention_dbias
from .problem import (  # fmt: skip
    LOG2E,
    Problem,
    column_range,
    kept,
    load_tile,
    locate,
    plane_of,
    probabilities,
    row_range,
    scores,
    step_tile,
    store_tile,
)
from .tiles import bound, dkdv_tile, dq_tile


@triton.jit
def _delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, log2_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm, stride_sb, stride_sh, n_tiles, heads, n_rows, dim_v,
    HAS_DLSE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = (program % n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = (program // n_tiles).to(tl.int64)
    b, head = plane // heads, plane % heads
    in_rows = rows < n_rows
    dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    out_ptr = plane_of(out_ptr, b, head, 0, stride_ob, stride_oh, stride_om, ALIGN=ALIGN)
    dout_ptr = plane_of(dout_ptr, b, head, 0, stride_gb, stride_gh, stride_gm, ALIGN=ALIGN)
    out = load_tile(out_ptr, rows, in_rows, stride_om, dv, stride_od, dim_v, ALIGN=ALIGN).to(tl.float32)
    dout = load_tile(dout_ptr, rows, in_rows, stride_gm, dv, stride_gd, dim_v, ALIGN=ALIGN).to(tl.float32)
    delta = tl.sum(out * dout, axis=1)
    if HAS_DLSE:
        delta -= tl.load(
            dlse_ptr + b * stride_lb + head * stride_lh + rows * stride_lm, mask=in_rows, other=0.0
        ).to(tl.float32)  # fmt: skip
    at = b * stride_sb + head * stride_sh + rows
    row_log2 = tl.load(log2_ptr + at, mask=in_rows, other=0.0)
    # Rows that saw nothing have no gradient, whatever came in for them.
    tl.store(delta_ptr + at, tl.where(row_log2 == float("inf"), 0.0, delta), mask=in_rows)


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, q_desc, dout_desc, q_ptr, dout_ptr, max_ptr, log2_ptr, delta_ptr,
    begin, end, cols, first_col, n_rows, n_cols, b, first_head, heads, group, start_q,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_gb, stride_gh, stride_gm, stride_gd, stride_sb, stride_sh,
    d, e, dim, dim_v, bias_ptr, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, offset, left, right, seed, threshold, keep_scale,
    NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Everything is transposed, (keys, queries): both products then take their left operand from registers.
    # The group's heads are part of one loop: nested in another, the sums would take more registers.
    tiles = tl.cdiv(end - begin, BLOCK_M)
    for turn in range(0, group * tiles):
        member = turn // tiles
        head = first_head + member
        start = begin + (turn - member * tiles) * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        slope = tl.load(slopes_ptr + b * stride_ab + head * stride_ah).to(tl.float32) if ALIBI else 0.0
        q_plane = plane_of(q_ptr, b, head, start_q, stride_qb, stride_qh, stride_qm, ALIGN=ALIGN)
        dout_plane = plane_of(dout_ptr, b, head, start_q, stride_gb, stride_gh, stride_gm, ALIGN=ALIGN)
        at_stats = b * stride_sb + head * stride_sh + start_q + rows
        q = step_tile(q_desc, b, head, start, q_plane, rows, n_rows, stride_qm, d, stride_qd, dim, ALIGN=ALIGN)
        t, slack = scores(
            tl.dot(k, tl.trans(q), input_precision=PRECISION), rows[None, :], cols[:, None], n_rows, n_cols,
            bias_ptr + head * stride_bh, stride_bm, stride_bn, slope, scale, softcap, offset, left, right,
            NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT, MASKED=MASKED,
        )  # fmt: skip
        row_max = tl.load(max_ptr + at_stats, mask=in_rows, other=0.0)
        row_log2 = tl.load(log2_ptr + at_stats, mask=in_rows, other=float("inf"))
        p = probabilities(t, row_max[None, :], row_log2[None, :], unit, EXACT=EXACT)
        dout = step_tile(
            dout_desc, b, head, start, dout_plane, rows, n_rows, stride_gm, e, stride_gd, dim_v, ALIGN=ALIGN
        )  # fmt: skip
        if DROPOUT:
            keep = tl.trans(kept(seed, b * heads + head, rows, first_col, threshold, BLOCK_N))
        if NEED_DV:
            dropped = tl.where(keep, p * keep_scale, 0.0) if DROPOUT else p
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if NEED_DK:
            delta = tl.load(delta_ptr + at_stats, mask=in_rows, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dt = p * (dp - delta[None, :]) * slack
            dk = tl.dot(dt.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, q_desc, dout_desc, dk_ptr, dv_ptr, max_ptr, log2_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_yb, stride_yh, stride_yn, stride_yd,
    stride_sb, stride_sh, cu_q_ptr, cu_k_ptr,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, left, right, seed_ptr, threshold, keep_scale,
    n_programs, n_tiles, n_seqs, heads, group, length_q, length_k, dim, dim_v,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_kv = (program // n_programs).to(tl.int64)
    b, tile, start_k, n_cols, start_q, n_rows = locate(
        program % n_programs, cu_k_ptr, cu_q_ptr, n_tiles, length_k, length_q, n_seqs, BLOCK=BLOCK_N, PACKED=PACKED
    )
    if tile * BLOCK_N < n_cols:
        first = tile * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        in_cols = cols < n_cols
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        e = tl.arange(0, BLOCK_DV).to(tl.int64)
        k_ptr = plane_of(k_ptr, b, head_kv, start_k, stride_kb, stride_kh, stride_kn, ALIGN=ALIGN)
        v_ptr = plane_of(v_ptr, b, head_kv, start_k, stride_vb, stride_vh, stride_vn, ALIGN=ALIGN)
        k = load_tile(k_ptr, cols, in_cols, stride_kn, d, stride_kd, dim, ALIGN=ALIGN)
        v = load_tile(v_ptr, cols, in_cols, stride_vn, e, stride_vd, dim_v, ALIGN=ALIGN)
        seed = tl.load(seed_ptr) if DROPOUT else 0
        offset = n_cols - n_rows if BOTTOM_RIGHT else 0
        begin, full_begin, full_end, end = row_range(
            first, first + BLOCK_N - 1, n_rows, n_cols, offset, left, right, BLOCK_M=BLOCK_M, LEFT=LEFT, RIGHT=RIGHT
        )
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            # Without a left bound the third run is empty.
            if phase < 2 or LEFT:
                dk, dv = _dkdv_tiles(
                    dk, dv, k, v, q_desc, dout_desc, q_ptr, dout_ptr, max_ptr, log2_ptr, delta_ptr,
                    low, high, cols, first, n_rows, n_cols, b, head_kv * group, heads, group, start_q,
                    stride_qb, stride_qh, stride_qm, stride_qd, stride_gb, stride_gh, stride_gm, stride_gd,
                    stride_sb, stride_sh, d, e, dim, dim_v,
                    bias_ptr + b * stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
                    scale, softcap, unit, offset, left, right, seed, threshold, keep_scale,
                    NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT,
                    DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=EXACT, MASKED=phase != 1,
                    NEED_DK=NEED_DK, NEED_DV=NEED_DV, ALIGN=ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
                )  # fmt: skip
        if NEED_DK:
            dk_ptr = plane_of(dk_ptr, b, head_kv, start_k, stride_xb, stride_xh, stride_xn, ALIGN=ALIGN)
            store_tile(dk_ptr, dk * scale, cols, in_cols, stride_xn, d, stride_xd, dim, ALIGN=ALIGN)
        if NEED_DV:
            dv_ptr = plane_of(dv_ptr, b, head_kv, start_k, stride_yb, stride_yh, stride_yn, ALIGN=ALIGN)
            store_tile(dv_ptr, dv, cols, in_cols, stride_yn, e, stride_yd, dim_v, ALIGN=ALIGN)


@triton.jit
def _dq_tiles(
    dq, q, dout, row_max, row_log2, delta, k_desc, v_desc, b, head_kv, k_ptr, v_ptr, begin, end, rows, n_rows, n_cols,
    stride_kn, stride_kd, stride_vn, stride_vd, d, e, dim, dim_v,
    bias_ptr, stride_bm, stride_bn, slope, scale, softcap, unit, offset, left, right, seed, plane, threshold,
    keep_scale,
    NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MASKED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = step_tile(k_desc, b, head_kv, start, k_ptr, cols, n_cols, stride_kn, d, stride_kd, dim, ALIGN=ALIGN)
        v = step_tile(v_desc, b, head_kv, start, v_ptr, cols, n_cols, stride_vn, e, stride_vd, dim_v, ALIGN=ALIGN)
        t, slack = scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], cols[None, :], n_rows, n_cols,
            bias_ptr, stride_bm, stride_bn, slope, scale, softcap, offset, left, right,
            NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT, MASKED=MASKED,
        )  # fmt: skip
        p = probabilities(t, row_max[:, None], row_log2[:, None], unit, EXACT=EXACT)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept(seed, plane, rows, start, threshold, BLOCK_N), dp * keep_scale, 0.0)
        dt = p * (dp - delta[:, None]) * slack
        dq = tl.dot(dt.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, k_desc, v_desc, dq_ptr, max_ptr, log2_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_xb, stride_xh, stride_xm, stride_xd,
    stride_sb, stride_sh, cu_q_ptr, cu_k_ptr,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, left, right, seed_ptr, threshold, keep_scale,
    n_programs, n_tiles, n_seqs, heads, group, length_q, length_k, dim, dim_v,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // n_programs).to(tl.int64)
    b, tile, start_q, n_rows, start_k, n_cols = locate(
        program % n_programs, cu_q_ptr, cu_k_ptr, n_tiles, length_q, length_k, n_seqs, BLOCK=BLOCK_M, PACKED=PACKED
    )
    if RIGHT:
        tile = tl.cdiv(n_rows, BLOCK_M) - 1 - tile
    if tile >= 0 and tile * BLOCK_M < n_rows:
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        e = tl.arange(0, BLOCK_DV).to(tl.int64)
        head_kv = head // group
        q_ptr = plane_of(q_ptr, b, head, start_q, stride_qb, stride_qh, stride_qm, ALIGN=ALIGN)
        dout_ptr = plane_of(dout_ptr, b, head, start_q, stride_gb, stride_gh, stride_gm, ALIGN=ALIGN)
        q = load_tile(q_ptr, rows, in_rows, stride_qm, d, stride_qd, dim, ALIGN=ALIGN)
        dout = load_tile(dout_ptr, rows, in_rows, stride_gm, e, stride_gd, dim_v, ALIGN=ALIGN)
        at_stats = b * stride_sb + head * stride_sh + start_q + rows
        row_max = tl.load(max_ptr + at_stats, mask=in_rows, other=0.0)
        row_log2 = tl.load(log2_ptr + at_stats, mask=in_rows, other=float("inf"))
        delta = tl.load(delta_ptr + at_stats, mask=in_rows, other=0.0)
        slope = tl.load(slopes_ptr + b * stride_ab + head * stride_ah).to(tl.float32) if ALIBI else 0.0
        seed = tl.load(seed_ptr) if DROPOUT else 0
        offset = n_cols - n_rows if BOTTOM_RIGHT else 0
        begin, full_begin, full_end, end = column_range(
            first, last, n_cols, offset, left, right, BLOCK_N=BLOCK_N, LEFT=LEFT, RIGHT=RIGHT
        )
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            if phase > 0 or LEFT:
                dq = _dq_tiles(
                    dq, q, dout, row_max, row_log2, delta, k_desc, v_desc, b, head_kv,
                    plane_of(k_ptr, b, head_kv, start_k, stride_kb, stride_kh, stride_kn, ALIGN=ALIGN),
                    plane_of(v_ptr, b, head_kv, start_k, stride_vb, stride_vh, stride_vn, ALIGN=ALIGN),
                    low, high, rows, n_rows, n_cols,
                    stride_kn, stride_kd, stride_vn, stride_vd, d, e, dim, dim_v,
                    bias_ptr + b * stride_bb + head * stride_bh, stride_bm, stride_bn, slope,
                    scale, softcap, unit, offset, left, right, seed, b * heads + head, threshold, keep_scale,
                    NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT,
                    DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=EXACT, MASKED=phase != 1, ALIGN=ALIGN, BLOCK_N=BLOCK_N,
                )  # fmt: skip
        dq_ptr = plane_of(dq_ptr, b, head, start_q, stride_xb, stride_xh, stride_xm, ALIGN=ALIGN)
        store_tile(dq_ptr, dq * scale, rows, in_rows, stride_xm, d, stride_xd, dim, ALIGN=ALIGN)


def attention_bwd(dout, dlse, q, k, v, out, stats, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left,
                  right, bottom_right, dropout_p, grads):  # fmt: skip
    """Fills ``grads`` = (dq, dk, dv), each shaped as its input or None; returns (dbias, dsinks) or Nones.

    ``dlse`` is the gradient of lse or None; ``grads`` ends with two flags, whether dbias and dsinks are wanted.
    """
    dq, dk, dv, need_dbias, need_dsinks = grads
    problem = Problem(
        q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p
    )
    delta = q.new_empty(problem.stats_shape(), dtype=torch.float32)
    if delta.numel() > 0:
        block_m = max(1, min(64, 8192 // (problem.blocks["BLOCK_DV"] * q.element_size())))
        n_tiles = triton.cdiv(problem.rows, block_m)
        planes = delta.numel() // problem.rows
        dlse_strides = (0, 0, 0) if dlse is None else ((0, *dlse.stride()) if problem.packed else dlse.stride())
        _delta_kernel[(n_tiles * planes,)](
            out, dout, delta if dlse is None else dlse, stats[1], delta,
            *problem.strides(out), *problem.strides(dout), *dlse_strides, *problem.stat_strides(),
            n_tiles, problem.heads, problem.rows, problem.dim_v,
            HAS_DLSE=dlse is not None, ALIGN=problem.align(out, dout), BLOCK_M=block_m,
            BLOCK_DV=problem.blocks["BLOCK_DV"], num_warps=4, **bound(q.dtype), **OPTIONS,
        )  # fmt: skip
    tail = (
        *problem.bias_args(), *problem.slope_args(), *problem.feature_args(), problem.keep_scale,
    )  # fmt: skip
    sizes = (
        problem.batch, problem.heads, problem.group, problem.rows, problem.cols, problem.dim, problem.dim_v,
    )  # fmt: skip
    inputs = (q, k, v, dout)
    if (dk is not None or dv is not None) and k.numel() + v.numel() > 0:
        tile = problem.fit(dkdv_tile(problem.widest, q.dtype, problem.arch, problem.load), "BLOCK_N", problem.cols)
        n_tiles, programs = problem.tiles(tile["BLOCK_N"], problem.cols)
        dk_or_k, dv_or_v = (k if dk is None else dk), (v if dv is None else dv)
        copies = problem.descriptors(q, dout, tile["BLOCK_M"], *problem.blocks.values())
        _attention_bwd_dkdv_kernel[(programs * problem.heads_kv,)](
            *inputs, *copies, dk_or_k, dv_or_v, stats[0], stats[1], delta,
            *(s for x in (*inputs, dk_or_k, dv_or_v) for s in problem.strides(x)), *problem.stat_strides(),
            *problem.cu, *tail, programs, n_tiles, *sizes,
            NEED_DK=dk is not None, NEED_DV=dv is not None, ALIGN=problem.align(dout, dk_or_k, dv_or_v),
            **problem.flags, **problem.blocks, **tile, **OPTIONS,
        )  # fmt: skip
    if dq is not None and q.numel() > 0:
        tile = problem.fit(dq_tile(problem.widest, q.dtype, problem.arch, problem.load), "BLOCK_M", problem.rows)
        n_tiles, programs = problem.tiles(tile["BLOCK_M"], problem.rows)
        copies = problem.descriptors(k, v, tile["BLOCK_N"], *problem.blocks.values())
        _attention_bwd_dq_kernel[(programs * problem.heads,)](
            *inputs, *copies, dq, stats[0], stats[1], delta,
            *(s for x in (*inputs, dq) for s in problem.strides(x)), *problem.stat_strides(),
            *problem.cu, *tail, programs, n_tiles, *sizes,
            ALIGN=problem.align(dout, dq), **problem.flags, **problem.blocks, **tile, **OPTIONS,
        )  # fmt: skip
    dbias = attention_dbias(problem, dout, stats, delta) if need_dbias else None
    dsinks = None
    if need_dsinks:
        p_sink = torch.exp2((sinks.float().view(-1, 1) - stats[0]) * LOG2E.value - stats[1])
        dsinks = -(p_sink * delta).sum(-1 if problem.packed else (0, -1)).to(sinks.dtype)
    return dbias, dsinks
