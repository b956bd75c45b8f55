"""Cross-entropy's backward: tiles of the gradient, each on its own, from the statistics of _cross_entropy's rows."""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, next_power_of_2, processor_count
from .logits import along, dlogits, merged, scaled, through_transform, tile, warps

# Elements to a turn of the rescaling, 16 to a thread; eight such programs fill a multiprocessor.
SCALE_TILE = 4096


@triton.jit
def _backward_kernel(
    dloss_ptr, dlse_ptr, dentropy_ptr, entropy_ptr,
    x_ptr, target_ptr, weight_ptr, stats_ptr, total_ptr, dx_ptr, dtarget_ptr,
    stride_dloss, stride_xb, stride_xc, stride_xs, stride_tb, stride_tc, stride_ts,
    stride_dxb, stride_dxc, stride_dxs, stride_dtb, stride_dtc, stride_dts,
    n_inner, n_rows, n_classes, ignore_index, smoothing, scale, cap, z_loss,
    HAS_DLOSS: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DENTROPY: tl.constexpr, MEAN: tl.constexpr,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, ROUND_FIRST: tl.constexpr, NEED_DX: tl.constexpr, NEED_DTARGET: tl.constexpr,
    ADJACENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_inner, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = inner < n_inner
    rows = outer * n_inner + inner
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_classes
    mask = in_rows[:, None] & in_cols[None, :]
    at = outer * stride_xb + (inner * stride_xs)[:, None] + along(cols, stride_xc, ADJACENT)[None, :]
    z = scaled(tl.load(x_ptr + at, mask=mask, other=0.0), scale, cap, HAS_SCALE, HAS_CAP)
    base = tl.load(stats_ptr + rows, mask=in_rows, other=0.0)
    rel = tl.load(stats_ptr + n_rows + rows, mask=in_rows, other=0.0)
    nll = rel[:, None] - (z - base[:, None])
    p = tl.exp(-nll)
    keep = in_rows
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :] if HAS_WEIGHT else 1.0
    if HAS_DLOSS:
        upstream = tl.load(dloss_ptr + rows * stride_dloss, mask=in_rows, other=0.0).to(tl.float32)
        share = 1.0 / tl.load(total_ptr) if MEAN else 1.0
        if PROBABILITIES:
            t_at = outer * stride_tb + (inner * stride_ts)[:, None] + along(cols, stride_tc, ADJACENT)[None, :]
            q = tl.load(target_ptr + t_at, mask=mask, other=0.0).to(tl.float32)
        else:
            y = tl.load(target_ptr + rows, mask=in_rows, other=0)
            keep = in_rows & (y != ignore_index)
            q = (cols[None, :] == y[:, None]).to(tl.float32)
    if NEED_DX:
        dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_DLOSS:
            slope = tl.load(stats_ptr + 2 * n_rows + rows, mask=in_rows, other=0.0)[:, None]
            factor = share if ROUND_FIRST else (upstream * share)[:, None]
            dx = dlogits(
                p, q, z, slope, weight, factor, smoothing, n_classes, scale, cap,
                HAS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_CAP,
            )  # fmt: skip
            if ROUND_FIRST:
                # As the forward's own gradient, rounded before the upstream's factor: both ways agree bit for bit.
                dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32) * upstream[:, None]
            dx = tl.where(keep[:, None], dx, 0.0)
        if HAS_DLSE:
            dlse = tl.load(dlse_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
            dx += through_transform(p * dlse[:, None], z, scale, cap, HAS_SCALE, HAS_CAP)
        if HAS_DENTROPY:
            dentropy = tl.load(dentropy_ptr + rows, mask=in_rows, other=0.0)
            entropy = tl.load(entropy_ptr + rows, mask=in_rows, other=0.0)
            dz = tl.where(p == 0.0, 0.0, p * (nll - entropy[:, None]) * dentropy[:, None])
            dx += through_transform(dz, z, scale, cap, HAS_SCALE, HAS_CAP)
        at = outer * stride_dxb + (inner * stride_dxs)[:, None] + along(cols, stride_dxc, ADJACENT)[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DTARGET:
        lse = base + rel
        dt = (1.0 - smoothing) * nll + (z_loss * lse * lse)[:, None]
        if HAS_WEIGHT:
            dt *= weight
        dt *= (upstream * share)[:, None]
        at = outer * stride_dtb + (inner * stride_dts)[:, None] + along(cols, stride_dtc, ADJACENT)[None, :]
        tl.store(dtarget_ptr + at, dt.to(dtarget_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(dx_ptr, dloss_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(dloss_ptr).to(tl.float32)
    # Mostly 1, and then nothing is moved. Read on the device: the host does not wait for it.
    if factor != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            dx = tl.load(dx_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            # An ignored row stays exactly 0 even where the upstream gradient is NaN.
            dx = tl.where(dx == 0.0, 0.0, dx * factor)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)


def cross_entropy_bwd(
    dloss, dlse, x, target, weight, stats, total,
    ignore_index, smoothing, softcap, scale, z_loss, reduction, needs, out=None, dentropy=None, entropy=None,
):  # fmt: skip
    """(dlogits, dtarget) as ``x`` and ``target``; one that ``needs`` does not ask for is an empty tensor.

    ``dloss`` is a scalar or (B * S,), ``dlse`` (B * S,), either may be None; the rest as in
    :func:`.cross_entropy.cross_entropy_fwd`. ``out`` receives dlogits, and may be ``x`` itself: a tile is read before
    it is written. ``dentropy`` and ``entropy`` (B * S,) fp32, or None: that output, and its gradient.
    """
    need_dx, need_dtarget = needs
    probabilities = target.is_floating_point()
    dx = out if out is not None else torch.empty_like(x) if need_dx else x.new_empty(0)
    dtarget = torch.empty_like(target) if need_dtarget else target.new_empty(0)
    n_rows = x.shape[0] * x.shape[2]
    if n_rows == 0:
        return dx, dtarget
    if dloss is None and need_dtarget:
        dtarget.zero_()
        need_dtarget = False
    views = [x, dx if need_dx else x, target if probabilities else x, dtarget if need_dtarget else x]
    x3, dx3, t3, dt3 = merged(*views)
    adjacent, block_m, block_n = tile(x3)
    adjacent = adjacent and all(t.stride(1) == 1 for t in (dx3, t3, dt3))
    if dloss is not None and dloss.dim():
        dloss = dloss.contiguous()
    _backward_kernel[(x3.shape[0] * triton.cdiv(x3.shape[2], block_m), triton.cdiv(x3.shape[1], block_n))](
        dloss, None if dlse is None else dlse.contiguous(), dentropy, entropy,
        x3, t3 if probabilities else target.contiguous(), weight, stats, total, dx3, dt3,
        0 if dloss is None or not dloss.dim() else 1, *x3.stride(), *t3.stride(), *dx3.stride(), *dt3.stride(),
        x3.shape[2], n_rows, x3.shape[1], ignore_index, smoothing, scale, softcap or 0.0, z_loss,
        HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None, HAS_DENTROPY=dentropy is not None,
        MEAN=reduction == "mean",
        PROBABILITIES=probabilities, HAS_WEIGHT=weight is not None, SMOOTHING=smoothing != 0.0,
        HAS_SCALE=scale != 1.0, HAS_CAP=softcap is not None,
        ROUND_FIRST=x.dtype == torch.bfloat16 or x.dtype == torch.float32,
        NEED_DX=need_dx, NEED_DTARGET=need_dtarget, ADJACENT=adjacent,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps(block_m * block_n), **OPTIONS,
    )  # fmt: skip
    return dx, dtarget


def scale(dx, dloss):
    """``dx``, contiguous, times the scalar ``dloss``, in place."""
    block = min(SCALE_TILE, next_power_of_2(dx.numel()))
    if dx.numel():
        programs = min(triton.cdiv(dx.numel(), block), 8 * processor_count(dx.device))
        _scale_kernel[(programs,)](dx, dloss, dx.numel(), BLOCK=block, num_warps=warps(block), **OPTIONS)
