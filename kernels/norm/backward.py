"""Layer norm and RMS norm after an optional residual add with dropout: the backward. See _norm.py for the formulas.

    g = dy * (weight + offset)
    dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + (the gradient that h itself received)
    dresidual = dh,  dinput = keep * dh / (1 - p),  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)

Up to BWD_ROW columns, half as many with dropout, a persistent grid reads every row once, prefetching the next tiles,
keeps its share of dweight and dbias in fp32 registers and leaves one partial row a program, which a second small kernel
sums; long rows go through it part by part (_norm_row.py), up to eight times as long ones shared by the blocks of a
cluster. Wider rows, and all wide ones where there are no clusters, do not leave room for that: 12 bytes a column of
sums, x and dy against a multiprocessor's 256 KB of registers. For them one kernel takes the two means of each row,
another walks blocks of columns with them, and x and dy are read twice. No atomics, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, RowView, cluster_blocks, next_power_of_2, processor_count
from ..math import is_kept, starts
from .forward import BLOCKED_COLS, row_tile, warps
from .long_row import is_long, norm_bwd_row

# The backward holds x, dy, weight and two fp32 sums of a row. Its tiles fill a multiprocessor's registers (16 warps x
# 128), so one program each: the partial rows stay below 5% of the bytes of 8192 rows. Philox takes as many again with
# dropout, a second gradient of another dtype some, and the addresses of rows that begin at odd places: half the tile
# for either, a quarter for both. Of wide rows a program takes WIDE_TILE of columns. From compiled register counts (no
# spills on sm_80, sm_90, sm_100), not yet from timings.
BWD_ROW = 8192
BWD_TILE = 8192
WIDE_TILE = (4, 1024)


# Bytes of shared memory that a program needs besides the tiles that it prefetches: 8,448 at most, of 32 rows at a time.
REDUCTIONS = 16 << 10


def stages(device: torch.device, tile_bytes: int) -> int:
    """Pipeline stages: with n of them n - 1 tiles of all that a step loads lie in shared memory, 3 at most.

    3 on sm_90 for whatever is loaded; sm_80 and sm_86 have less of it (163 and 99 KB a block), where tiles of fp32 and
    of a residual's gradient would not fit.
    """
    if device.type != "cuda":
        return 3
    free = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - REDUCTIONS
    return max(1, min(3, 1 + free // tile_bytes))


@triton.jit
def _row_means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    dy_inner, stride_dyo, stride_dyi, x_inner, stride_xo, stride_xi, n_cols, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += starts(row, dy_inner, stride_dyo, stride_dyi)
    x_ptr += starts(row, x_inner, stride_xo, stride_xi)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else 0.0
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * ((x - mean) * rstd)
    if CENTER:
        tl.store(mean_g_ptr + row, tl.sum(sum_g, axis=0) / n_cols)
    tl.store(mean_gx_ptr + row, tl.sum(sum_gx, axis=0) / n_cols)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    dinput_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    dy_inner, stride_dyo, stride_dyi, dh_inner, stride_dho, stride_dhi, x_inner, stride_xo, stride_xi,
    n_rows, n_cols, offset, p,
    WHOLE: tl.constexpr, CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DH: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DINPUT: tl.constexpr, NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32) + offset
    if DROPOUT and NEED_DINPUT:
        seed = tl.load(seed_ptr)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(program, tl.cdiv(n_rows, BLOCK_M), programs, num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        dy_at = starts(rows, dy_inner, stride_dyo, stride_dyi)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        if NEED_DINPUT or NEED_DRESIDUAL or NEED_DWEIGHT:
            x_at = starts(rows, x_inner, stride_xo, stride_xi)[:, None] + cols[None, :]
            x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
            if CENTER:
                x -= tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
            xhat = tl.where(mask, x * rstd[:, None], 0.0)
        if NEED_DINPUT or NEED_DRESIDUAL:
            g = dy * weight[None, :] if HAS_WEIGHT else dy
            if WHOLE:
                mean_gx = tl.sum(g * xhat, axis=1) / n_cols
            else:
                mean_gx = tl.load(mean_gx_ptr + rows, mask=in_rows, other=0.0)
            dx = g - xhat * mean_gx[:, None]
            if CENTER:
                mean_g = tl.sum(g, axis=1) / n_cols if WHOLE else tl.load(mean_g_ptr + rows, mask=in_rows, other=0.0)
                dx -= mean_g[:, None]
            dx *= rstd[:, None]
            if HAS_DH:
                dh_at = starts(rows, dh_inner, stride_dho, stride_dhi)[:, None] + cols[None, :]
                dx += tl.load(dh_ptr + dh_at, mask=mask, other=0.0).to(tl.float32)
            at = rows[:, None] * n_cols + cols[None, :]
            if NEED_DRESIDUAL:
                tl.store(dresidual_ptr + at, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
            if NEED_DINPUT:
                if DROPOUT:
                    dx = tl.where(is_kept(seed, rows, cols, p), dx * (1.0 / (1.0 - p)), 0.0)
                tl.store(dinput_ptr + at, dx.to(dinput_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            dweight += tl.sum(dy * xhat, axis=0)
        if NEED_DBIAS:
            dbias += tl.sum(dy, axis=0)
    partial = program.to(tl.int64) * n_cols + cols
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, dweight, mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, dbias, mask=in_cols)


@triton.jit
def _column_sum_kernel(
    partial_dweight_ptr, partial_dbias_ptr, dweight_ptr, dbias_ptr, n_parts, n_cols,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_parts, BLOCK_M):
        parts = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (parts < n_parts)[:, None] & in_cols[None, :]
        at = parts[:, None] * n_cols + cols[None, :]
        if NEED_DWEIGHT:
            dweight += tl.load(partial_dweight_ptr + at, mask=mask, other=0.0)
        if NEED_DBIAS:
            dbias += tl.load(partial_dbias_ptr + at, mask=mask, other=0.0)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=in_cols)


def norm_bwd(
    dy, dh, x, weight, seed, mean, rstd,
    input_dtype: torch.dtype, bias_dtype: torch.dtype, offset: float, p: float, center: bool, needs,
):  # fmt: skip
    """The gradients (dinput, dresidual, dweight, dbias); one that ``needs`` does not ask for is an empty tensor.

    Args:
        dy: the gradient of y. dh: that of h, or None.
        x: what was normed: the input, or h. weight, seed, offset, p, center: as in :func:`._norm.norm_fwd`.
        mean, rstd: from there.
        needs: for (input, residual, weight, bias). The first two have the same gradient where ``p`` is 0 and the
            dtypes agree: then dinput alone is filled, and stands for both.

    dinput comes in ``input_dtype``, dresidual in x's dtype, dweight in weight's, dbias in ``bias_dtype``; all sums
    are fp32.
    """
    n_cols = x.shape[-1]
    need_dinput, need_dresidual, need_dweight, need_dbias = needs
    if p == 0.0 and input_dtype == x.dtype:
        need_dinput, need_dresidual = need_dinput or need_dresidual, False
    dinput = x.new_empty(x.shape if need_dinput else 0, dtype=input_dtype)
    dresidual = x.new_empty(x.shape if need_dresidual else 0)
    dweight = x.new_empty(n_cols if need_dweight else 0, dtype=weight.dtype if need_dweight else x.dtype)
    dbias = x.new_empty(n_cols if need_dbias else 0, dtype=bias_dtype)
    x_rows, dy_rows = RowView(x, n_cols), RowView(dy, n_cols)
    dh_rows = dy_rows if dh is None else RowView(dh, n_cols)
    n_rows = x_rows.count
    if n_rows == 0:
        return dinput, dresidual, dweight.zero_(), dbias.zero_()
    flags = dict(CENTER=center, HAS_WEIGHT=weight is not None)
    wanted = dict(NEED_DWEIGHT=need_dweight, NEED_DBIAS=need_dbias)
    dx_wanted = dict(NEED_DINPUT=need_dinput, NEED_DRESIDUAL=need_dresidual)
    mean_g = mean_gx = None
    processors = processor_count(x.device)
    heavy, odd = p > 0.0 or (need_dinput and need_dresidual), n_cols % 16 != 0
    tile = BWD_TILE >> (heavy + odd)
    row = BWD_ROW if p == 0.0 else BWD_ROW // 2
    whole = n_cols <= row
    long = whole and (is_long(n_cols) or n_cols > tile // 2)
    # The row sums are what blocks of a cluster exchange: without dx there are none.
    shares = need_dinput or need_dresidual
    blocks = cluster_blocks(x.device, n_cols, row) if shares and not whole else 0
    if whole:
        block_m, block_n = (1, next_power_of_2(n_cols)) if long else row_tile(n_rows, n_cols, tile)
        programs = min(triton.cdiv(n_rows, block_m), processors)
    elif blocks:
        block_m, block_n = 1, next_power_of_2(n_cols)
        programs = min(n_rows, max(1, processors // blocks))
    else:
        block_m, block_n = WIDE_TILE
        # Two programs a multiprocessor, over the column blocks and the rows.
        programs = max(1, 2 * processors // triton.cdiv(n_cols, block_n))
        programs = min(triton.cdiv(n_rows, block_m), programs)
        if need_dinput or need_dresidual:
            mean_g = x.new_empty(n_rows if center else 0, dtype=torch.float32)
            mean_gx = x.new_empty(n_rows, dtype=torch.float32)
            _row_means_kernel[(n_rows,)](
                dy_rows.data, x_rows.data, weight, mean, rstd, mean_g, mean_gx,
                *dy_rows.layout, *x_rows.layout, n_cols, offset,
                **flags, BLOCK_N=BLOCKED_COLS, num_warps=warps(BLOCKED_COLS), maxnreg=128, **OPTIONS,
            )  # fmt: skip
    parts = x.new_empty(need_dweight + need_dbias, programs, n_cols, dtype=torch.float32)
    partial = (parts[0], parts[-1]) if len(parts) else (None, None)
    inputs = (dy_rows.data, None if dh is None else dh_rows.data, x_rows.data, weight)
    layouts = (*dy_rows.layout, *dh_rows.layout, *x_rows.layout)
    flags |= dict(HAS_DH=dh is not None, **dx_wanted, **wanted)
    loaded = sum(t.element_size() for t in (dy, dh, x) if t is not None)
    n_stages = stages(x.device, block_m * block_n * loaded // (blocks or 1))
    if blocks or long:
        args = (*inputs, seed, mean, rstd, dinput, dresidual, *partial)
        norm_bwd_row(programs, blocks or 1, n_stages, args, layouts, n_rows, n_cols, offset, p, flags)
    else:
        n_warps = warps(block_m * block_n << odd, 8) if whole and odd else warps(block_m * block_n)
        # For more occupancy than one program a multiprocessor, two of wide rows, ptxas would spill: more there are not.
        registers = min(255, 2048 // n_warps) if whole or p > 0.0 else 128
        _norm_bwd_kernel[(programs, triton.cdiv(n_cols, block_n))](
            *inputs, seed, mean, rstd, mean_g, mean_gx, dinput, dresidual, *partial,
            *layouts, n_rows, n_cols, offset, p, WHOLE=whole, **flags, DROPOUT=p > 0.0,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=n_warps, STAGES=n_stages, maxnreg=registers, **OPTIONS,
        )  # fmt: skip
    if need_dweight or need_dbias:
        block_m, block_n = (32, 64) if whole else (8, 256)
        _column_sum_kernel[(triton.cdiv(n_cols, block_n),)](
            *partial, dweight, dbias, programs, n_cols,
            **wanted, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return dinput, dresidual, dweight, dbias
