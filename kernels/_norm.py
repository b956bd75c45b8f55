"""Layer norm and RMS norm (the same without centring), forward and backward.

    xhat = (x - mean) * rstd,  rstd = 1 / sqrt(mean((x - mean)^2) + eps),  y = xhat * weight + bias
    g = dy * weight
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)

RMS norm is mean = 0 throughout. Rows of up to FWD_ROW columns stay in registers: the forward reads x once. Up to
BWD_ROW, the backward reads x and dy once, on a persistent grid that prefetches the next tiles (cp.async), keeps its
share of dweight and dbias in fp32 registers and leaves one partial row per program, summed by a second small kernel.
No atomics, so results repeat bit for bit. Wider rows are walked in blocks: x is read twice.
"""

import torch
import triton
import triton.language as tl

from ._launch import as_rows, next_power_of_2, processor_count

# Widest rows that no program spills on sm_80, sm_90 and sm_100, from compiled register counts, not yet from timings.
# The backward holds x, dy, weight and two fp32 sums of a row. Its tiles fill a multiprocessor's registers (16 warps x
# 128), so one program each: the partial rows stay below 5% of the bytes of 8192 rows.
FWD_ROW, BWD_ROW = 32768, 8192
FWD_TILE, BWD_TILE = 4096, 8192
BLOCKED_COLS = 4096


def _warps(elements: int, most: int = 16) -> int:
    return max(1, min(most, elements // 512))


def _row_tile(n_rows: int, n_cols: int, tile: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of a whole-row tile: several short rows to a program, one long one."""
    block_n = next_power_of_2(n_cols)
    block_m = max(1, min(tile // block_n, next_power_of_2(n_rows), 32))
    return block_m, block_n


@triton.jit
def _norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, n_rows, n_cols, eps,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < n_rows, cols < n_cols
    mask = in_rows[:, None] & in_cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        mean = tl.sum(x, axis=1) / n_cols
        tl.store(mean_ptr + rows, mean, mask=in_rows)
        # The tail lanes hold 0, not mean: without the mask they would add mean^2 each to the variance.
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_blocked_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, n_cols, eps,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * n_cols
    mean = 0.0
    square = 0.0  # sum of (x - mean)^2 over the columns seen so far, merged block by block (Chan et al. 1983, eq. 2.1)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            count = tl.minimum(n_cols - start, BLOCK_N)
            block_mean = tl.sum(x, axis=0) / count
            x = tl.where(mask, x - block_mean, 0.0)
            delta = block_mean - mean
            seen = start + count
            square += tl.sum(x * x, axis=0) + delta * delta * (start * (count / seen))
            mean += delta * (count / seen)
        else:
            square += tl.sum(x * x, axis=0)
    rstd = 1.0 / tl.sqrt(square / n_cols + eps)
    if CENTER:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        y = (tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm_fwd(x, weight, bias, eps: float, center: bool):
    """``x`` (..., N), ``weight`` and ``bias`` (N,) or None -> y as x, mean and rstd (rows,) in fp32.

    ``mean`` is empty when ``center`` is False (RMS norm).
    """
    n_cols = x.shape[-1]
    rows = as_rows(x, n_cols)
    n_rows = rows.shape[0]
    y = x.new_empty(x.shape)
    mean = x.new_empty(n_rows if center else 0, dtype=torch.float32)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    if n_rows == 0:
        return y, mean, rstd
    tensors = (rows, weight, bias, y, mean, rstd)
    flags = dict(CENTER=center, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None)
    if n_cols <= FWD_ROW:
        block_m, block_n = _row_tile(n_rows, n_cols, FWD_TILE)
        _norm_fwd_kernel[(triton.cdiv(n_rows, block_m),)](
            *tensors, rows.stride(0), n_rows, n_cols, eps, **flags,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=_warps(block_m * block_n, 32),
        )  # fmt: skip
    else:
        _norm_fwd_blocked_kernel[(n_rows,)](
            *tensors, rows.stride(0), n_cols, eps, **flags, BLOCK_N=BLOCKED_COLS, num_warps=_warps(BLOCKED_COLS)
        )
    return y, mean, rstd


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_xm, n_rows, n_cols,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(program, tl.cdiv(n_rows, BLOCK_M), programs, num_stages=3):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_DX or NEED_DWEIGHT:
            x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
            if CENTER:
                x -= tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
            xhat = tl.where(mask, x * rstd[:, None], 0.0)
        if NEED_DX:
            g = dy * weight[None, :] if HAS_WEIGHT else dy
            dx = g - xhat * (tl.sum(g * xhat, axis=1) / n_cols)[:, None]
            if CENTER:
                dx -= (tl.sum(g, axis=1) / n_cols)[:, None]
            dx *= rstd[:, None]
            tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
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
def _norm_bwd_dx_blocked_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr,
    stride_dym, stride_xm, n_cols,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dym
    x_ptr += row * stride_xm
    dx_ptr += row * n_cols
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else 0.0
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * ((x - mean) * rstd)
    mean_g = tl.sum(sum_g, axis=0) / n_cols if CENTER else 0.0
    mean_gx = tl.sum(sum_gx, axis=0) / n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dx = rstd * (g - mean_g - xhat * mean_gx)
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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


@triton.jit
def _norm_bwd_columns_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_xm, n_rows, n_cols,
    CENTER: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Wide rows: a program owns a block of columns, which its own loads fill, and walks every row.
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_DWEIGHT:
            x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTER:
                x -= tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
            dweight += dy * (x * tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None])
        if NEED_DBIAS:
            dbias += dy
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=in_cols)


def norm_bwd(dy, x, weight, mean, rstd, center: bool, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool]):
    """The gradients (dx, dweight, dbias); one that ``needs`` does not ask for is an empty tensor.

    ``dy`` and ``x`` (..., N), ``weight`` (N,) or None, ``mean`` and ``rstd`` from :func:`norm_fwd`.
    dx comes in x's dtype, dweight in weight's, dbias in ``bias_dtype``; all sums are fp32.
    """
    n_cols = x.shape[-1]
    need_dx, need_dweight, need_dbias = needs
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = x.new_empty(n_cols if need_dweight else 0, dtype=weight.dtype if need_dweight else x.dtype)
    dbias = x.new_empty(n_cols if need_dbias else 0, dtype=bias_dtype)
    dy_rows, x_rows = as_rows(dy, n_cols), as_rows(x, n_cols)
    n_rows = x_rows.shape[0]
    if n_rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    strides = (dy_rows.stride(0), x_rows.stride(0))
    flags = dict(NEED_DWEIGHT=need_dweight, NEED_DBIAS=need_dbias)
    if n_cols > BWD_ROW:
        if need_dx:
            _norm_bwd_dx_blocked_kernel[(n_rows,)](
                dy_rows, x_rows, weight, mean, rstd, dx, *strides, n_cols,
                CENTER=center, HAS_WEIGHT=weight is not None, BLOCK_N=BLOCKED_COLS, num_warps=_warps(BLOCKED_COLS),
            )  # fmt: skip
        if need_dweight or need_dbias:
            block_m, block_n = 16, 128
            _norm_bwd_columns_kernel[(triton.cdiv(n_cols, block_n),)](
                dy_rows, x_rows, mean, rstd, dweight, dbias, *strides, n_rows, n_cols,
                CENTER=center, **flags, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
            )  # fmt: skip
        return dx, dweight, dbias
    block_m, block_n = _row_tile(n_rows, n_cols, BWD_TILE)
    programs = min(triton.cdiv(n_rows, block_m), processor_count(x.device))
    parts = x.new_empty(2 if need_dweight and need_dbias else 1, programs, n_cols, dtype=torch.float32)
    _norm_bwd_kernel[(programs,)](
        dy_rows, x_rows, weight, mean, rstd, dx, parts[0], parts[-1], *strides, n_rows, n_cols,
        CENTER=center, HAS_WEIGHT=weight is not None, NEED_DX=need_dx, **flags,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=_warps(block_m * block_n),
    )  # fmt: skip
    if need_dweight or need_dbias:
        _column_sum_kernel[(triton.cdiv(n_cols, 64),)](
            parts[0], parts[-1], dweight, dbias, programs, n_cols, **flags, BLOCK_M=32, BLOCK_N=64, num_warps=4
        )
    return dx, dweight, dbias
