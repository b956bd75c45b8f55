"""Cross-entropy over logits, forward and backward.

    z = cap * tanh(scale * x / cap)   (or scale * x),   p = softmax(z),   lse = logsumexp(z)
    q = the target's distribution: one-hot at y, or the class probabilities t;   w = class weights (or 1)
    q' = (1 - smoothing) * q + smoothing / C
    loss = sum_c w_c q'_c (lse - z_c) + z_loss * lse^2 * sum_c w_c q_c
    dloss/dz_c = p_c * A - w_c q'_c,   A = sum_c w_c q'_c + 2 * z_loss * lse * sum_c w_c q_c
    dloss/dt_c = (1 - smoothing) * w_c * (lse - z_c) + z_loss * lse^2 * w_c

Logits come as (B, C, S): classes in the middle, positions either side of them, any strides. A tile is BLOCK_M positions
by BLOCK_N classes; which of the two is long follows which is adjacent in memory. The forward walks the classes once
and keeps three fp32 numbers a position: the maximum, lse less the maximum (so that large logits lose nothing), and A.
The backward's tiles are independent. The target's own element is folded in before rounding, where p - 1 cancels.
"""

import torch
import triton
import triton.language as tl

from ._launch import next_power_of_2
from ._math import tanh

# 16 fp32 values a thread at 8 warps; chosen from compiled register counts (sm_90), not yet from timings.
TILE = 4096
REDUCE = 4096


@triton.jit
def _scaled(x, scale, cap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    z = x.to(tl.float32)
    if HAS_SCALE:
        z *= scale
    if HAS_CAP:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def _at(cols, stride, ADJACENT: tl.constexpr):
    """Offsets along the classes: 32 bits suffice only where the stride is 1."""
    return cols if ADJACENT else cols.to(tl.int64) * stride


@triton.jit
def _forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, stats_ptr, mass_ptr,
    stride_xb, stride_xc, stride_xs, stride_tb, stride_tc, stride_ts,
    n_inner, n_rows, n_classes, ignore_index, smoothing, scale, cap, z_loss,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, NEED_MASS: tl.constexpr, ADJACENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_inner, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = inner < n_inner
    rows = outer * n_inner + inner
    x_ptr += outer * stride_xb
    x_rows = inner * stride_xs
    if PROBABILITIES:
        target_ptr += outer * stride_tb
        t_rows = inner * stride_ts
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_M,), tl.float32)  # the maximum so far, or 0 while that is -inf: what z is taken against
    total = tl.zeros((BLOCK_M,), tl.float32)  # sum exp(z - base)
    mass = tl.zeros((BLOCK_M,), tl.float32)  # sum w q
    dot = tl.zeros((BLOCK_M,), tl.float32)  # sum w q (z - base)
    weights = 0.0  # sum w
    spread = tl.zeros((BLOCK_M,), tl.float32)  # sum w (z - base)
    for start in range(0, n_classes, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        in_cols = cols < n_classes
        mask = in_rows[:, None] & in_cols[None, :]
        x = tl.load(x_ptr + x_rows[:, None] + _at(cols, stride_xc, ADJACENT)[None, :], mask=mask, other=0.0)
        z = tl.where(in_cols[None, :], _scaled(x, scale, cap, HAS_SCALE, HAS_CAP), float("-inf"))
        before, shift = top, base
        top = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        shift -= base
        z -= base[:, None]
        total = total * tl.exp(before - base) + tl.sum(tl.exp(z), axis=1)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        if PROBABILITIES:
            at = t_rows[:, None] + _at(cols, stride_tc, ADJACENT)[None, :]
            q = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                q *= weight
            dot += shift * mass + tl.sum(tl.where(in_cols[None, :], q * z, 0.0), axis=1)
            mass += tl.sum(q, axis=1)
        if SMOOTHING:
            wz = weight * z if HAS_WEIGHT else z
            spread += shift * weights + tl.sum(tl.where(in_cols[None, :], wz, 0.0), axis=1)
            weights += tl.sum(weight) if HAS_WEIGHT else tl.sum(in_cols.to(tl.float32))
    rel = tl.log(total)
    lse = base + rel
    keep = in_rows
    if not PROBABILITIES:
        y = tl.load(target_ptr + rows, mask=in_rows, other=0)
        keep = in_rows & (y != ignore_index)
        known = (y >= 0) & (y < n_classes)
        tl.device_assert(known | ~keep, "cross_entropy: a target is neither ignore_index nor in [0, C)")
        hit = keep & known
        x = tl.load(x_ptr + x_rows + y.to(tl.int64) * stride_xc, mask=hit, other=0.0)
        dot = _scaled(x, scale, cap, HAS_SCALE, HAS_CAP) - base
        if HAS_WEIGHT:
            mass = tl.load(weight_ptr + y, mask=hit, other=0.0).to(tl.float32)
            dot *= mass
        else:
            mass = hit.to(tl.float32)
        dot = tl.where(known, dot, float("nan"))  # where asserts are compiled out, a bad target shows as NaN
    loss = mass * rel - dot
    slope = mass
    if SMOOTHING:
        share = smoothing / n_classes
        loss = (1.0 - smoothing) * loss + share * (weights * rel - spread)
        slope = (1.0 - smoothing) * mass + share * weights
    loss += z_loss * mass * lse * lse
    slope += 2.0 * z_loss * mass * lse
    if not PROBABILITIES:
        slope = tl.where(known, slope, float("nan"))
    loss = tl.where(keep, loss, 0.0)
    slope = tl.where(keep, slope, 0.0)
    tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=in_rows)
    tl.store(lse_ptr + rows, lse, mask=in_rows)
    tl.store(stats_ptr + rows, base, mask=in_rows)
    tl.store(stats_ptr + n_rows + rows, rel, mask=in_rows)
    tl.store(stats_ptr + 2 * n_rows + rows, slope, mask=in_rows)
    if NEED_MASS:
        tl.store(mass_ptr + rows, tl.where(keep, mass, 0.0), mask=in_rows)


@triton.jit
def _reduce_kernel(
    rows_ptr, mass_ptr, loss_ptr, total_ptr, n_rows,
    MEAN: tl.constexpr, HAS_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    loss = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        loss += tl.load(rows_ptr + rows, mask=rows < n_rows, other=0.0)
        if HAS_MASS:
            mass += tl.load(mass_ptr + rows, mask=rows < n_rows, other=0.0)
        else:
            mass += (rows < n_rows).to(tl.float32)
    result = tl.sum(loss, axis=0)
    if MEAN:
        total = tl.sum(mass, axis=0)
        # 0 / 0 is spelled out: a mean over nothing is NaN, as in torch.
        result = tl.where(total == 0.0, result * float("nan"), result / tl.where(total == 0.0, 1.0, total))
        tl.store(total_ptr, total)
    tl.store(loss_ptr, result.to(loss_ptr.dtype.element_ty))


@triton.jit
def _backward_kernel(
    dloss_ptr, dlse_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, total_ptr, dx_ptr, dtarget_ptr,
    stride_dloss, stride_xb, stride_xc, stride_xs, stride_tb, stride_tc, stride_ts,
    stride_dxb, stride_dxc, stride_dxs, stride_dtb, stride_dtc, stride_dts,
    n_inner, n_rows, n_classes, ignore_index, smoothing, scale, cap, z_loss,
    HAS_DLOSS: tl.constexpr, HAS_DLSE: tl.constexpr, MEAN: tl.constexpr, PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DTARGET: tl.constexpr, ADJACENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_inner, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = inner < n_inner
    rows = outer * n_inner + inner
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_classes
    mask = in_rows[:, None] & in_cols[None, :]
    at = outer * stride_xb + (inner * stride_xs)[:, None] + _at(cols, stride_xc, ADJACENT)[None, :]
    z = _scaled(tl.load(x_ptr + at, mask=mask, other=0.0), scale, cap, HAS_SCALE, HAS_CAP)
    base = tl.load(stats_ptr + rows, mask=in_rows, other=0.0)
    rel = tl.load(stats_ptr + n_rows + rows, mask=in_rows, other=0.0)
    nll = rel[:, None] - (z - base[:, None])
    p = tl.exp(-nll)
    keep = in_rows
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_DLOSS:
        upstream = tl.load(dloss_ptr + rows * stride_dloss, mask=in_rows, other=0.0).to(tl.float32)
        if MEAN:
            upstream /= tl.load(total_ptr)
        if PROBABILITIES:
            t_at = outer * stride_tb + (inner * stride_ts)[:, None] + _at(cols, stride_tc, ADJACENT)[None, :]
            q = tl.load(target_ptr + t_at, mask=mask, other=0.0).to(tl.float32)
        else:
            y = tl.load(target_ptr + rows, mask=in_rows, other=0)
            keep = in_rows & (y != ignore_index)
            q = (cols[None, :] == y[:, None]).to(tl.float32)
    if NEED_DX:
        dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_DLOSS:
            slope = tl.load(stats_ptr + 2 * n_rows + rows, mask=in_rows, other=0.0)
            if SMOOTHING:
                q = (1.0 - smoothing) * q + smoothing / n_classes
            if HAS_WEIGHT:
                q *= weight
            dz = tl.where(keep[:, None], (p * slope[:, None] - q) * upstream[:, None], 0.0)
        if HAS_DLSE:
            dz += p * tl.load(dlse_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        if HAS_CAP:
            ratio = z / cap
            dz *= 1.0 - ratio * ratio
        if HAS_SCALE:
            dz *= scale
        at = outer * stride_dxb + (inner * stride_dxs)[:, None] + _at(cols, stride_dxc, ADJACENT)[None, :]
        tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DTARGET:
        lse = base + rel
        dt = (1.0 - smoothing) * nll + (z_loss * lse * lse)[:, None]
        if HAS_WEIGHT:
            dt *= weight
        dt *= upstream[:, None]
        at = outer * stride_dtb + (inner * stride_dts)[:, None] + _at(cols, stride_dtc, ADJACENT)[None, :]
        tl.store(dtarget_ptr + at, dt.to(dtarget_ptr.dtype.element_ty), mask=mask)


def _merged(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, C, S) tensors as (1, C, B * S) where all of them have their positions at one stride."""
    b, c, s = tensors[0].shape
    if s == 1:
        return tuple(t.permute(2, 1, 0) for t in tensors)
    if all(b == 1 or t.stride(0) == s * t.stride(2) for t in tensors):
        return tuple(t.as_strided((1, c, b * s), (0, t.stride(1), t.stride(2))) for t in tensors)
    return tensors


def _tile(x: torch.Tensor) -> tuple[bool, int, int]:
    """(classes are adjacent in memory, BLOCK_M positions, BLOCK_N classes) for (B, C, S)."""
    _, n_classes, n_inner = x.shape
    if x.stride(1) == 1:
        block_n = min(next_power_of_2(n_classes), TILE)
        return True, max(1, min(TILE // block_n, next_power_of_2(n_inner), 32)), block_n
    # Half a tile: with class weights and probabilities 64-bit offsets along both sides would spill.
    block_m = min(next_power_of_2(n_inner), 64)
    return False, block_m, min(next_power_of_2(n_classes), TILE // 2 // block_m)


def _warps(elements: int) -> int:
    return max(1, min(8, elements // 512))


def cross_entropy_fwd(
    x, target, weight, ignore_index, smoothing, softcap, scale, z_loss, reduction, loss_dtype
):  # fmt: skip
    """The loss of logits ``x`` (B, C, S) and what the backward needs.

    Args:
        target: (B, S) int64 class indices, or (B, C, S) floating class probabilities.
        weight: (C,) contiguous, or None.
        softcap: cap > 0 or None. reduction: "none", "mean" or "sum".

    Returns:
        loss: scalar, or (B * S,) for "none", in ``loss_dtype``.
        lse: (B * S,) fp32.
        stats: (3, B * S) fp32, for the backward.
        total: () fp32, the mean's denominator; empty for the other reductions.
    """
    n_rows = x.shape[0] * x.shape[2]
    n_classes = x.shape[1]
    probabilities = target.is_floating_point()
    mean, none = reduction == "mean", reduction == "none"
    rows = x.new_empty(n_rows, dtype=loss_dtype if none else torch.float32)
    lse = x.new_empty(n_rows, dtype=torch.float32)
    stats = x.new_empty((3, n_rows), dtype=torch.float32)
    total = x.new_empty(() if mean else 0, dtype=torch.float32)
    need_mass = mean and not probabilities
    mass = x.new_empty(n_rows if need_mass else 0, dtype=torch.float32)
    loss = rows if none else x.new_empty((), dtype=loss_dtype)
    if n_rows:
        x, t = _merged(x, target) if probabilities else (*_merged(x), target.contiguous())
        adjacent, block_m, block_n = _tile(x)
        if probabilities:
            adjacent = adjacent and t.stride(1) == 1
        # Asserts are compiled in for this kernel alone; its integer arithmetic needs none of the overflow checks.
        asserts = dict(debug=True, sanitize_overflow=False) if x.is_cuda else {}
        _forward_kernel[(x.shape[0] * triton.cdiv(x.shape[2], block_m),)](
            x, t, weight, rows, lse, stats, mass, *x.stride(), *(t.stride() if probabilities else (0, 0, 0)),
            x.shape[2], n_rows, n_classes, ignore_index, smoothing, scale, softcap or 0.0, z_loss,
            PROBABILITIES=probabilities, HAS_WEIGHT=weight is not None, SMOOTHING=smoothing != 0.0,
            HAS_SCALE=scale != 1.0, HAS_CAP=softcap is not None, NEED_MASS=need_mass, ADJACENT=adjacent,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=_warps(block_m * block_n), **asserts,
        )  # fmt: skip
    if not none:
        block = min(next_power_of_2(n_rows), REDUCE)
        _reduce_kernel[(1,)](
            rows, mass, loss, total, n_rows, MEAN=mean, HAS_MASS=need_mass, BLOCK=block, num_warps=_warps(block)
        )
    return loss, lse, stats, total


def cross_entropy_bwd(
    dloss, dlse, x, target, weight, stats, total,
    ignore_index, smoothing, softcap, scale, z_loss, reduction, needs,
):  # fmt: skip
    """(dlogits, dtarget) as ``x`` and ``target``; one that ``needs`` does not ask for is an empty tensor.

    ``dloss`` is a scalar or (B * S,), ``dlse`` (B * S,), either may be None; the rest as in :func:`cross_entropy_fwd`.
    """
    need_dx, need_dtarget = needs
    probabilities = target.is_floating_point()
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dtarget = torch.empty_like(target) if need_dtarget else target.new_empty(0)
    n_rows = x.shape[0] * x.shape[2]
    if n_rows == 0:
        return dx, dtarget
    if dloss is None and need_dtarget:
        dtarget.zero_()
        need_dtarget = False
    views = [x, dx if need_dx else x, target if probabilities else x, dtarget if need_dtarget else x]
    x3, dx3, t3, dt3 = _merged(*views)
    adjacent, block_m, block_n = _tile(x3)
    adjacent = adjacent and all(t.stride(1) == 1 for t in (dx3, t3, dt3))
    if dloss is not None and dloss.dim():
        dloss = dloss.contiguous()
    _backward_kernel[(x3.shape[0] * triton.cdiv(x3.shape[2], block_m), triton.cdiv(x3.shape[1], block_n))](
        dloss, None if dlse is None else dlse.contiguous(), x3, t3 if probabilities else target.contiguous(), weight,
        stats, total, dx3, dt3,
        0 if dloss is None or not dloss.dim() else 1, *x3.stride(), *t3.stride(), *dx3.stride(), *dt3.stride(),
        x3.shape[2], n_rows, x3.shape[1], ignore_index, smoothing, scale, softcap or 0.0, z_loss,
        HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None, MEAN=reduction == "mean",
        PROBABILITIES=probabilities, HAS_WEIGHT=weight is not None, SMOOTHING=smoothing != 0.0,
        HAS_SCALE=scale != 1.0, HAS_CAP=softcap is not None, NEED_DX=need_dx, NEED_DTARGET=need_dtarget,
        ADJACENT=adjacent, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=_warps(block_m * block_n),
    )  # fmt: skip
    return dx, dtarget
