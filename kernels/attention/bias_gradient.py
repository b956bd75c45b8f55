"""The gradient of attention's additive bias: ds summed over the dimensions along which the bias is broadcast.

A program owns one tile of the bias and walks, in a fixed order, every batch, head, row and column that shares it; so
nothing of the size S x S exists but the gradient itself, and no atomics are needed. A bias of few tiles, as one of
(1, 1, 1, Sk), gives its walk to several programs: batches, heads or rows in pieces, whose sums are added afterwards.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS
from .problem import kept, load_tile, plane_of, probabilities, scores
from .tiles import dbias_tile


@triton.jit
def _product(
    a_ptr, rows, in_rows, stride_am, stride_ad, b_ptr, cols, in_cols, stride_bn, stride_bd, dim,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """a b^T of a tile of rows and one of columns, STEP of the head dim at a time: registers do not grow with it."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, BLOCK_D, STEP):
        d = (start + tl.arange(0, STEP)).to(tl.int64)
        a = load_tile(a_ptr, rows, in_rows, stride_am, d, stride_ad, dim, ALIGN=ALIGN)
        b = load_tile(b_ptr, cols, in_cols, stride_bn, d, stride_bd, dim, ALIGN=ALIGN)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dbias_ptr, max_ptr, log2_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_sb, stride_sh, cu_q_ptr, cu_k_ptr,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, left, right, seed_ptr, threshold, keep_scale,
    batch, heads, group, length_q, length_k, dim, dim_v, bias_planes, bias_heads, bias_rows, bias_cols,
    row_tiles, col_tiles, batch_pieces, batch_step, head_pieces, head_step, row_step,
    ALL_BATCHES: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STEP: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = (program // col_tiles) % row_tiles
    plane = (program // (col_tiles * row_tiles) % bias_planes).to(tl.int64)
    piece = program // (col_tiles * row_tiles) // bias_planes
    batch_piece = piece % batch_pieces
    head_piece = piece // batch_pieces % head_pieces
    row_piece = piece // batch_pieces // head_pieces
    bias_b, bias_head = plane // bias_heads, plane % bias_heads
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_b, last_b = bias_b, bias_b + 1
    if ALL_BATCHES:
        first_b = bias_b + batch_piece * batch_step
        last_b = tl.minimum(first_b + batch_step, batch)
    first_head, last_head = bias_head, bias_head + 1
    if ALL_HEADS:
        first_head = bias_head + head_piece * head_step
        last_head = tl.minimum(first_head + head_step, heads)
    for b in range(first_b, last_b):
        start_q = plane * 0
        start_k = plane * 0
        n_rows = length_q
        n_cols = length_k
        if PACKED:
            start_q = tl.load(cu_q_ptr + b).to(tl.int64)
            start_k = tl.load(cu_k_ptr + b).to(tl.int64)
            n_rows = (tl.load(cu_q_ptr + b + 1).to(tl.int64) - start_q).to(tl.int32)
            n_cols = (tl.load(cu_k_ptr + b + 1).to(tl.int64) - start_k).to(tl.int32)
        offset = n_cols - n_rows if BOTTOM_RIGHT else 0
        first_row = row_piece * row_step if ALL_ROWS else row_tile * BLOCK_M
        last_row = tl.minimum(n_rows, first_row + row_step) if ALL_ROWS else tl.minimum(n_rows, first_row + BLOCK_M)
        first_col = col_tile * BLOCK_N
        last_col = n_cols if ALL_COLS else tl.minimum(n_cols, first_col + BLOCK_N)
        for head in range(first_head, last_head):
            head_kv = head // group
            slope = tl.load(slopes_ptr + b * stride_ab + head * stride_ah).to(tl.float32) if ALIBI else 0.0
            q_plane = plane_of(q_ptr, b, head, start_q, stride_qb, stride_qh, stride_qm, ALIGN=ALIGN)
            k_plane = plane_of(k_ptr, b, head_kv, start_k, stride_kb, stride_kh, stride_kn, ALIGN=ALIGN)
            v_plane = plane_of(v_ptr, b, head_kv, start_k, stride_vb, stride_vh, stride_vn, ALIGN=ALIGN)
            dout_plane = plane_of(dout_ptr, b, head, start_q, stride_gb, stride_gh, stride_gm, ALIGN=ALIGN)
            for row in range(first_row, last_row, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                in_rows = rows < n_rows
                at_stats = b * stride_sb + head * stride_sh + start_q + rows
                row_max = tl.load(max_ptr + at_stats, mask=in_rows, other=0.0)
                row_log2 = tl.load(log2_ptr + at_stats, mask=in_rows, other=float("inf"))
                delta = tl.load(delta_ptr + at_stats, mask=in_rows, other=0.0)
                for col in range(first_col, last_col, BLOCK_N):
                    cols = col + tl.arange(0, BLOCK_N)
                    in_cols = cols < n_cols
                    dot = _product(
                        q_plane, rows, in_rows, stride_qm, stride_qd, k_plane, cols, in_cols, stride_kn, stride_kd, dim,
                        PRECISION=PRECISION, ALIGN=ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, STEP=STEP,
                    )  # fmt: skip
                    t, _ = scores(
                        dot, rows[:, None], cols[None, :], n_rows, n_cols,
                        bias_ptr + b * stride_bb + head * stride_bh, stride_bm, stride_bn, slope, scale,
                        softcap, offset, left, right,
                        NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT, MASKED=True,
                    )  # fmt: skip
                    p = probabilities(t, row_max[:, None], row_log2[:, None], unit, EXACT=EXACT)
                    dp = _product(
                        dout_plane, rows, in_rows, stride_gm, stride_gd, v_plane, cols, in_cols, stride_vn, stride_vd,
                        dim_v, PRECISION=PRECISION, ALIGN=ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_DV,
                        STEP=STEP_V,
                    )  # fmt: skip
                    if DROPOUT:
                        keep = kept(seed, b * heads + head, rows, col, threshold, BLOCK_N)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    acc += p * (dp - delta[:, None])
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dbias_ptr += (piece.to(tl.int64) * bias_planes + plane) * bias_rows * bias_cols
    if ALL_ROWS and ALL_COLS:
        tl.store(dbias_ptr, tl.sum(tl.sum(acc, axis=1), axis=0).to(dbias_ptr.dtype.element_ty))
    elif ALL_ROWS:
        tl.store(dbias_ptr + cols, tl.sum(acc, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < bias_cols)
    elif ALL_COLS:
        tl.store(dbias_ptr + rows, tl.sum(acc, axis=1).to(dbias_ptr.dtype.element_ty), mask=rows < bias_rows)
    else:
        tl.store(
            dbias_ptr + rows[:, None] * bias_cols + cols[None, :], acc.to(dbias_ptr.dtype.element_ty),
            mask=(rows < bias_rows)[:, None] & (cols < bias_cols)[None, :],
        )  # fmt: skip


# Programs to have at least, where the bias has fewer tiles: some turns of the largest GPU.
PROGRAMS = 512
# Of a row that a step of the product over the head dim takes.
STEP_BYTES = 128


def _pieces(count: int, wanted: int) -> tuple[int, int]:
    """(pieces, length of each): ``count`` in at most ``wanted`` pieces."""
    step = triton.cdiv(max(count, 1), max(min(wanted, count), 1))
    return triton.cdiv(max(count, 1), step), step


def attention_dbias(problem, dout, stats, delta):
    """The gradient (as bias, contiguous) for the call ``problem`` describes."""
    bias = problem.bias
    if bias.numel() == 0:
        return bias.new_empty(bias.shape)
    tile = dbias_tile(problem.q.dtype, problem.arch)
    b, heads, rows, cols = bias.shape
    row_tiles, col_tiles = triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(cols, tile["BLOCK_N"])
    programs = b * heads * row_tiles * col_tiles
    wanted = PROGRAMS // programs
    batches, batch_step = _pieces(problem.batch, wanted if b == 1 else 1)
    members, head_step = _pieces(problem.heads, wanted // batches if heads == 1 else 1)
    parts, row_step = _pieces(
        triton.cdiv(problem.rows, tile["BLOCK_M"]), wanted // (batches * members) if rows == 1 else 1
    )
    pieces = batches * members * parts
    dbias = bias.new_empty((pieces, *bias.shape), dtype=bias.dtype if pieces == 1 else torch.float32)
    q, k, v = problem.q, problem.k, problem.v
    step = STEP_BYTES // q.element_size()
    _attention_dbias_kernel[(programs * pieces,)](
        q, k, v, dout, dbias, stats[0], stats[1], delta,
        *(s for x in (q, k, v, dout) for s in problem.strides(x)), *problem.stat_strides(), *problem.cu,
        *problem.bias_args(), *problem.slope_args(), *problem.feature_args(), problem.keep_scale,
        problem.batch, problem.heads, problem.group, problem.rows, problem.cols, problem.dim, problem.dim_v,
        b * heads, heads, rows, cols, row_tiles, col_tiles, batches, batch_step, members, head_step,
        row_step * tile["BLOCK_M"],
        ALL_BATCHES=b == 1, ALL_HEADS=heads == 1, ALL_ROWS=rows == 1, ALL_COLS=cols == 1,
        STEP=min(step, problem.blocks["BLOCK_D"]), STEP_V=min(step, problem.blocks["BLOCK_DV"]),
        ALIGN=problem.align(dout), **problem.flags, **problem.blocks, **tile, **OPTIONS,
    )  # fmt: skip
    return dbias[0] if pieces == 1 else dbias.sum(0).to(bias.dtype)
