"""Layer norm and RMS norm (the same without centring), after an optional residual add with dropout: the forward.

    h = residual + keep * input / (1 - p), rounded to the residual's dtype;   h = input where there is no residual
    xhat = (h - mean) * rstd,  rstd = 1 / sqrt(mean((h - mean)^2) + eps),  y = xhat * (weight + offset) + bias

RMS norm is mean = 0 throughout. Rows of up to FWD_ROW columns stay in registers, so that every tensor is read or
written once, short ones as a tile of several, long ones part by part (_norm_row.py); 16-bit ones stay there as 16 bits
up to twice that (_norm_packed.py). Wider ones, up to 8 * FWD_ROW, are shared by the blocks of a cluster. Where there
are no clusters they are walked in blocks, twice; the second walk finds in the cache what the first has left there.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, RowView, cluster_blocks, next_power_of_2, tuned
from ..math import is_kept, starts
from .long_row import is_long, norm_fwd_row
from .packed import norm_fwd_packed, packable

# Widest row that no program spills on sm_80, sm_90 and sm_100, and tiles that keep 8 warps busy with 16 elements a
# thread: from compiled register counts, not yet from timings.
FWD_ROW = 32768
FWD_TILE = 4096
BLOCKED_COLS = 4096


def warps(elements: int, most: int = 16) -> int:
    return max(1, min(most, elements // 512))


def row_tile(n_rows: int, n_cols: int, tile: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of a whole-row tile: several short rows to a program, one long one."""
    block_n = next_power_of_2(n_cols)
    return max(1, min(tile // block_n, next_power_of_2(n_rows), 32)), block_n


@triton.jit
def _added(
    x_ptr, residual_ptr, h_ptr, seed_ptr, x_at, residual_at, h_at, rows, cols, mask, p,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """h in fp32, stored where there is a residual."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if HAS_RESIDUAL:
        if DROPOUT:
            x = tl.where(is_kept(tl.load(seed_ptr), rows, cols, p), x * (1.0 / (1.0 - p)), 0.0)
        x += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_at, h, mask=mask)
        x = h.to(tl.float32)
    return x


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_inner, stride_xo, stride_xi, r_inner, stride_ro, stride_ri, n_rows, n_cols, eps, offset, p,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < n_rows, cols < n_cols
    mask = in_rows[:, None] & in_cols[None, :]
    x_at = starts(rows, x_inner, stride_xo, stride_xi)[:, None] + cols[None, :]
    r_at = starts(rows, r_inner, stride_ro, stride_ri)[:, None] + cols[None, :]
    y_at = rows[:, None] * n_cols + cols[None, :]
    x = _added(
        x_ptr, residual_ptr, h_ptr, seed_ptr, x_at, r_at, y_at, rows, cols, mask, p,
        HAS_RESIDUAL, DROPOUT, "evict_first",
    )  # fmt: skip
    if CENTER:
        mean = tl.sum(x, axis=1) / n_cols
        tl.store(mean_ptr + rows, mean, mask=in_rows)
        # The tail lanes hold 0, not mean: without the mask they would add mean^2 each to the variance.
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= (tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32) + offset)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_blocked_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_inner, stride_xo, stride_xi, r_inner, stride_ro, stride_ri, n_cols, eps, offset, p,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += starts(row, x_inner, stride_xo, stride_xi)
    y_ptr += row * n_cols
    if HAS_RESIDUAL:
        residual_ptr += starts(row, r_inner, stride_ro, stride_ri)
        h_ptr += row * n_cols
    mean = 0.0
    square = 0.0  # sum of (x - mean)^2 over the columns seen so far, merged block by block (Chan et al. 1983, eq. 2.1)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < n_cols)[None, :]
        at = cols[None, :]
        x = _added(
            x_ptr, residual_ptr, h_ptr, seed_ptr, at, at, at, rows, cols, mask, p,
            HAS_RESIDUAL, DROPOUT, "evict_first" if HAS_RESIDUAL else "evict_last",
        )  # fmt: skip
        if CENTER:
            count = tl.minimum(n_cols - start, BLOCK_N)
            block_mean = tl.sum(x) / count
            x = tl.where(mask, x - block_mean, 0.0)
            delta = block_mean - mean
            seen = start + count
            square += tl.sum(x * x) + delta * delta * (start * (count / seen))
            mean += delta * (count / seen)
        else:
            square += tl.sum(x * x)
    rstd = 1.0 / tl.sqrt(square / n_cols + eps)
    if CENTER:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if HAS_RESIDUAL:
        # The row just stored is read back, by whichever threads.
        tl.debug_barrier()
        x_ptr = h_ptr
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = (x - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm_fwd(x, residual, weight, bias, seed, eps: float, offset: float, p: float, center: bool):
    """The normed rows of ``x`` (..., N), plus ``residual`` of its shape where that is not None.

    Args:
        weight, bias: (N,) contiguous, or None. ``offset`` is added to the weight.
        seed: (1,) int64 on the device where ``p`` > 0, the dropout of ``x`` before the residual add; else None.
        center: take the mean off (layer norm) or not (RMS norm).

    Returns:
        y as ``x``; h as ``residual`` (empty without one); mean and rstd (rows,) fp32, mean empty unless ``center``.
    """
    n_cols = x.shape[-1]
    rows = RowView(x, n_cols)
    y = x.new_empty(x.shape)
    h = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    mean = x.new_empty(rows.count if center else 0, dtype=torch.float32)
    rstd = x.new_empty(rows.count, dtype=torch.float32)
    if rows.count == 0:
        return y, h, mean, rstd
    more = rows if residual is None else RowView(residual, n_cols)
    inputs, outputs = (rows.data, None if residual is None else more.data, weight, bias), (y, h, mean, rstd)
    args = (*inputs, seed, *outputs)
    layouts = (*rows.layout, *more.layout)
    flags = dict(
        CENTER=center, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None
    )
    # Where rows begin at odd places, random numbers of more columns would take half a minute to compile.
    slow = p > 0.0 and n_cols % 16 != 0 and n_cols > FWD_ROW // 2
    held = n_cols <= FWD_ROW and not slow
    if held and is_long(n_cols):
        norm_fwd_row(rows.count, 1, args, layouts, n_cols, eps, offset, p, flags)
    elif held:
        # Rows that begin at odd places have an address a column: half the tile, for ptxas would rather spill them than
        # lose occupancy.
        odd = n_cols % 16 != 0
        bound = dict(maxnreg=128) if odd else {}
        block_m, block_n = row_tile(rows.count, n_cols, FWD_TILE >> odd)
        settings = dict(BLOCK_M=block_m, num_warps=warps(block_m * block_n << odd, 8))
        settings = tuned("norm_fwd", x.device, (block_m, block_n, x.element_size(), residual is not None), settings)
        _norm_fwd_kernel[(triton.cdiv(rows.count, settings["BLOCK_M"]),)](
            *args, *layouts, rows.count, n_cols, eps, offset, p, **flags, DROPOUT=p > 0.0,
            BLOCK_N=block_n, **settings, **bound, **OPTIONS,
        )  # fmt: skip
    elif n_cols <= 2 * FWD_ROW and p == 0.0 and packable(inputs, layouts, n_cols):
        norm_fwd_packed(rows.count, (*inputs, *outputs), layouts, n_cols, eps, offset, flags)
    elif not slow and (blocks := cluster_blocks(x.device, n_cols, FWD_ROW)):
        norm_fwd_row(rows.count, blocks, args, layouts, n_cols, eps, offset, p, flags)
    else:
        _norm_fwd_blocked_kernel[(rows.count,)](
            *args, *layouts, n_cols, eps, offset, p, **flags, DROPOUT=p > 0.0,
            BLOCK_N=BLOCKED_COLS, num_warps=warps(BLOCKED_COLS), maxnreg=128, **OPTIONS,
        )  # fmt: skip
    return y, h, mean, rstd
