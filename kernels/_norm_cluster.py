"""The norms for rows that several multiprocessors share: a thread block cluster holds a row, and reads it once.

Each of its up to 8 blocks has its part of the columns in registers, as the whole-row kernels have all of them; row sums
go through the cluster's shared memory, and dweight and dbias stay where their columns are. For sm_90 and later, and a
Triton that reduces across a cluster. Formulas as in _norm.py and _norm_backward.py.
"""

import triton
import triton.language as tl

from ._launch import OPTIONS, next_power_of_2
from ._math import starts


@triton.jit
def _norm_fwd_cluster_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_inner, stride_xo, stride_xi, r_inner, stride_ro, stride_ri, n_cols, eps, offset,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols
    x_ptr += starts(row, x_inner, stride_xo, stride_xi)
    x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr += starts(row, r_inner, stride_ro, stride_ri)
        x += tl.load(residual_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * n_cols + cols, h, mask=mask)
        x = h.to(tl.float32)
    if CENTER:
        mean = tl.sum(x, axis=0) / n_cols
        tl.store(mean_ptr + row, mean)
        # The tail lanes hold 0, not mean.
        x = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_cluster_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dinput_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    dy_inner, stride_dyo, stride_dyi, dh_inner, stride_dho, stride_dhi, x_inner, stride_xo, stride_xi,
    n_rows, n_cols, offset,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DH: tl.constexpr,
    NEED_DINPUT: tl.constexpr, NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    mask = cols < n_cols
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for index in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=3):
        row = tl.cast(index, tl.int64)
        dy_at = starts(row, dy_inner, stride_dyo, stride_dyi) + cols
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        x_at = starts(row, x_inner, stride_xo, stride_xi) + cols
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTER:
            x -= tl.load(mean_ptr + row)
        xhat = tl.where(mask, x * rstd, 0.0)
        g = dy * weight if HAS_WEIGHT else dy
        dx = g - xhat * (tl.sum(g * xhat, axis=0) / n_cols)
        if CENTER:
            dx -= tl.sum(g, axis=0) / n_cols
        dx *= rstd
        if HAS_DH:
            dh_at = starts(row, dh_inner, stride_dho, stride_dhi) + cols
            dx += tl.load(dh_ptr + dh_at, mask=mask, other=0.0).to(tl.float32)
        if NEED_DRESIDUAL:
            tl.store(dresidual_ptr + row * n_cols + cols, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if NEED_DINPUT:
            tl.store(dinput_ptr + row * n_cols + cols, dx.to(dinput_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            dweight += dy * xhat
        if NEED_DBIAS:
            dbias += dy
    partial = tl.program_id(0).to(tl.int64) * n_cols + cols
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, dweight, mask=mask)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, dbias, mask=mask)


def norm_fwd_cluster(n_rows: int, blocks: int, args, layouts, n_cols: int, eps: float, offset: float, flags) -> None:
    """As the launches in :func:`._norm.norm_fwd`, a cluster of ``blocks`` to a row, without dropout."""
    block_n = next_power_of_2(n_cols)
    _norm_fwd_cluster_kernel[(n_rows,)](
        *args, *layouts, n_cols, eps, offset, **flags, BLOCK_N=block_n,
        num_warps=max(1, min(32, block_n // (1024 * blocks))), num_ctas=blocks, **OPTIONS,
    )  # fmt: skip


def norm_bwd_cluster(programs: int, blocks: int, args, layouts, n_rows: int, n_cols: int, offset: float, flags) -> None:
    """As the launches in :func:`._norm_backward.norm_bwd`, ``programs`` clusters of ``blocks``, without dropout."""
    block_n = next_power_of_2(n_cols)
    _norm_bwd_cluster_kernel[(programs,)](
        *args, *layouts, n_rows, n_cols, offset, **flags, BLOCK_N=block_n,
        num_warps=max(1, min(16, block_n // (512 * blocks))), num_ctas=blocks, **OPTIONS,
    )  # fmt: skip
