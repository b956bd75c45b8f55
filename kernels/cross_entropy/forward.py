"""Cross-entropy over logits: the forward, which can leave the logits' gradient behind too.

    z = cap * tanh(scale * x / cap)   (or scale * x),   p = softmax(z),   lse = logsumexp(z)
    q = the target's distribution: one-hot at y, or the class probabilities t;   w = class weights (or 1)
    q' = (1 - smoothing) * q + smoothing / C
    loss = sum_c w_c q'_c (lse - z_c) + z_loss * lse^2 * sum_c w_c q_c
    dloss/dz_c = p_c * slope - w_c q'_c,   slope = sum_c w_c q'_c + 2 * z_loss * lse * sum_c w_c q_c
    dloss/dt_c = (1 - smoothing) * w_c * (lse - z_c) + z_loss * lse^2 * w_c

Logits come as (B, C, S): classes in the middle, positions either side of them, any strides. A tile is BLOCK_M positions
by BLOCK_N classes; which of the two is long follows which is adjacent in memory. The forward keeps three fp32 numbers a
position: the maximum, lse less the maximum (so that large logits lose nothing), and the slope. Asked for the gradient,
it reads rows of up to ROW classes once and wider ones twice, the second time from the cache where that holds them.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, next_power_of_2
from .logits import along, dlogits, merged, scaled, tile, warps

# Widest row that is held in registers, and the widest where something is held beside it (class weights, the soft cap's
# slope, the entropy's terms). Elements a sum's program takes at a time. No spills on sm_80, sm_90, sm_100.
ROW = 32768
ROW_BESIDE = 8192
SUM_BLOCK = 4096


@triton.jit
def _accumulate(
    x, q, weight, mask, in_cols, top, base, total, mass, dot, weights, spread, tilt, scale, cap,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A block of classes into a row's sums, relative to the maximum so far; first z, and z less that maximum."""
    z = tl.where(in_cols[None, :], scaled(x, scale, cap, HAS_SCALE, HAS_CAP), float("-inf"))
    before, shift = top, base
    top = tl.maximum(top, tl.max(z, axis=1))
    base = tl.where(top == float("-inf"), 0.0, top)
    shift -= base
    below = z - base[:, None]
    if ENTROPY:
        tilt = tl.exp(before - base) * (tilt + shift * total)
        tilt += tl.sum(tl.where(below == float("-inf"), 0.0, tl.exp(below) * below), axis=1)
    total = total * tl.exp(before - base) + tl.sum(tl.exp(below), axis=1)
    if PROBABILITIES:
        wq = q * weight if HAS_WEIGHT else q
        dot += shift * mass + tl.sum(tl.where(in_cols[None, :], wq * below, 0.0), axis=1)
        mass += tl.sum(wq, axis=1)
    if SMOOTHING:
        wz = weight * below if HAS_WEIGHT else below
        spread += shift * weights + tl.sum(tl.where(in_cols[None, :], wz, 0.0), axis=1)
        weights += tl.sum(weight) if HAS_WEIGHT else tl.sum(in_cols.to(tl.float32))
    return z, below, top, base, total, mass, dot, weights, spread, tilt


@triton.jit
def _forward_kernel(
    x_ptr, target_ptr, weight_ptr, total_ptr, factor_ptr, loss_ptr, lse_ptr, stats_ptr, hit_ptr, entropy_ptr, dx_ptr,
    stride_xb, stride_xc, stride_xs, stride_tb, stride_tc, stride_ts, stride_dxs,
    n_inner, n_rows, n_classes, ignore_index, smoothing, scale, cap, z_loss,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr, MEAN: tl.constexpr, HAS_FACTOR: tl.constexpr,
    ACCURACY: tl.constexpr, ENTROPY: tl.constexpr, ADJACENT: tl.constexpr, WHOLE: tl.constexpr,
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
    else:
        y = tl.load(target_ptr + rows, mask=in_rows, other=0)
        keep = in_rows & (y != ignore_index)
        known = (y >= 0) & (y < n_classes)
        tl.device_assert(known | ~keep, "cross_entropy: a target is neither ignore_index nor in [0, C)")
        hit = keep & known
        own = scaled(
            tl.load(x_ptr + x_rows + y.to(tl.int64) * stride_xc, mask=hit, other=0.0), scale, cap, HAS_SCALE, HAS_CAP
        )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_M,), tl.float32)  # the maximum so far, or 0 while that is -inf: what z is taken against
    total = tl.zeros((BLOCK_M,), tl.float32)  # sum exp(z - base)
    mass = tl.zeros((BLOCK_M,), tl.float32)  # sum w q
    dot = tl.zeros((BLOCK_M,), tl.float32)  # sum w q (z - base)
    weights = 0.0  # sum w
    spread = tl.zeros((BLOCK_M,), tl.float32)  # sum w (z - base)
    tilt = tl.zeros((BLOCK_M,), tl.float32)  # sum exp(z - base) (z - base)
    if WHOLE:
        cols = tl.arange(0, BLOCK_N)
        in_cols = cols < n_classes
        mask = in_rows[:, None] & in_cols[None, :]
        x = tl.load(x_ptr + x_rows[:, None] + along(cols, stride_xc, ADJACENT)[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :] if HAS_WEIGHT else 1.0
        q = 0.0
        if PROBABILITIES:
            at = t_rows[:, None] + along(cols, stride_tc, ADJACENT)[None, :]
            q = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z, below, top, base, total, mass, dot, weights, spread, tilt = _accumulate(
            x, q, weight, mask, in_cols, top, base, total, mass, dot, weights, spread, tilt, scale, cap,
            PROBABILITIES, HAS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_CAP, ENTROPY,
        )  # fmt: skip
    else:
        for start in range(0, n_classes, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            in_cols = cols < n_classes
            mask = in_rows[:, None] & in_cols[None, :]
            x = tl.load(
                x_ptr + x_rows[:, None] + along(cols, stride_xc, ADJACENT)[None, :], mask=mask, other=0.0,
                eviction_policy="evict_last" if GRADIENT else "",
            )  # fmt: skip
            weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :] if HAS_WEIGHT else 1.0
            q = 0.0
            if PROBABILITIES:
                at = t_rows[:, None] + along(cols, stride_tc, ADJACENT)[None, :]
                q = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
            _, _, top, base, total, mass, dot, weights, spread, tilt = _accumulate(
                x, q, weight, mask, in_cols, top, base, total, mass, dot, weights, spread, tilt, scale, cap,
                PROBABILITIES, HAS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_CAP, ENTROPY,
            )  # fmt: skip
    rel = tl.log(total)
    lse = base + rel
    if not PROBABILITIES:
        dot = own - base
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
        slope = tl.where(keep, tl.where(known, slope, float("nan")), 0.0)
        loss = tl.where(keep, loss, 0.0)
    tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=in_rows)
    tl.store(lse_ptr + rows, lse, mask=in_rows)
    tl.store(stats_ptr + rows, base, mask=in_rows)
    tl.store(stats_ptr + n_rows + rows, rel, mask=in_rows)
    tl.store(stats_ptr + 2 * n_rows + rows, slope, mask=in_rows)
    if ACCURACY:
        tl.store(hit_ptr + rows, (hit & (own >= top)).to(tl.float32), mask=in_rows)
    if ENTROPY:
        tl.store(entropy_ptr + rows, rel - tilt / total, mask=in_rows)
    if GRADIENT:
        dx_rows = inner * stride_dxs
        factor = 1.0 / tl.load(total_ptr) if MEAN else 1.0
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr + rows, mask=in_rows, other=0.0)[:, None]
        if WHOLE:
            q = (cols[None, :] == y[:, None]).to(tl.float32)
            dx = dlogits(
                tl.exp(-(rel[:, None] - below)), q, z, slope[:, None], weight, factor, smoothing, n_classes, scale, cap,
                HAS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_CAP,
            )  # fmt: skip
            dx = tl.where(keep[:, None], dx, 0.0)
            tl.store(dx_ptr + dx_rows[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            for start in range(0, n_classes, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                in_cols = cols < n_classes
                mask = in_rows[:, None] & in_cols[None, :]
                x = tl.load(
                    x_ptr + x_rows[:, None] + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
                )
                z = scaled(x, scale, cap, HAS_SCALE, HAS_CAP)
                weight = (
                    tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :] if HAS_WEIGHT else 1.0
                )
                q = (cols[None, :] == y[:, None]).to(tl.float32)
                dx = dlogits(
                    tl.exp(-(rel[:, None] - (z - base[:, None]))), q, z, slope[:, None], weight, factor,
                    smoothing, n_classes, scale, cap, HAS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_CAP,
                )  # fmt: skip
                dx = tl.where(keep[:, None], dx, 0.0)
                tl.store(dx_ptr + dx_rows[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mass_kernel(
    target_ptr, weight_ptr, sums_ptr, n_rows, n_classes, ignore_index, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program's share of the class weights of the targets that count."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        y = tl.load(target_ptr + rows, mask=rows < n_rows, other=ignore_index)
        hit = (rows < n_rows) & (y != ignore_index) & (y >= 0) & (y < n_classes)
        mass += tl.load(weight_ptr + y, mask=hit, other=0.0).to(tl.float32) if HAS_WEIGHT else hit.to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(mass, axis=0))


@triton.jit
def _sum_kernel(x_ptr, total_ptr, sums_ptr, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Each program's share of the sum, over ``total`` where that is given: a mean over nothing is NaN, as in torch."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        acc += tl.load(x_ptr + at, mask=at < n, other=0.0)
    result = tl.sum(acc, axis=0)
    if MEAN:
        total = tl.load(total_ptr)
        result = tl.where(total == 0.0, float("nan"), result / tl.where(total == 0.0, 1.0, total))
    tl.store(sums_ptr + tl.program_id(0), result.to(sums_ptr.dtype.element_ty))


def _programs(n: int) -> tuple[int, int]:
    """(programs, block) of a sum over n elements: few enough that one program can add up what they leave."""
    block = min(next_power_of_2(n), SUM_BLOCK)
    return max(1, min(triton.cdiv(n, block), 128)), block


def _sum_into(out, x, total=None):
    """The sum of the fp32 vector ``x``, over ``total`` where given, into the scalar ``out``; in a fixed order."""
    programs, block = _programs(x.numel())
    if programs > 1:
        parts = x.new_empty(programs)
        _sum_kernel[(programs,)](x, None, parts, x.numel(), MEAN=False, BLOCK=block, num_warps=warps(block), **OPTIONS)
        return _sum_into(out, parts, total)
    _sum_kernel[(1,)](x, total, out, x.numel(), MEAN=total is not None, BLOCK=block, num_warps=warps(block), **OPTIONS)


def target_mass(target, weight, n_classes: int, ignore_index: int):
    """() fp32: the class weights of the targets that count, which a mean divides by."""
    total = torch.empty((), dtype=torch.float32, device=target.device)
    programs, block = _programs(target.numel())
    parts = total if programs == 1 else total.new_empty(programs)
    _mass_kernel[(programs,)](
        target, weight, parts, target.numel(), n_classes, ignore_index,
        HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps(block), **OPTIONS,
    )  # fmt: skip
    if programs > 1:
        _sum_into(total, parts)
    return total


def cross_entropy_fwd(
    x, target, weight, ignore_index, smoothing, softcap, scale, z_loss, reduction, loss_dtype, with_gradient=False
):  # fmt: skip
    """The loss of logits ``x`` (B, C, S) and what the backward needs.

    Args:
        target: (B, S) int64 class indices, or (B, C, S) floating class probabilities.
        weight: (C,) contiguous, or None.
        softcap: cap > 0 or None. reduction: "none", "mean" or "sum".
        with_gradient: also leave the gradient of the loss in the logits, as if its own upstream gradient were 1.
            For class indices and S = 1 with adjacent classes.

    Returns:
        loss: scalar, or (B * S,) for "none", in ``loss_dtype``.
        lse: (B * S,) fp32.
        stats: (3, B * S) fp32, for the backward.
        total: () fp32, the mean's denominator; empty for the other reductions.
        dlogits: as ``x``, contiguous; empty unless asked for.
    """
    n_rows = x.shape[0] * x.shape[2]
    n_classes = x.shape[1]
    probabilities = target.is_floating_point()
    mean, none = reduction == "mean", reduction == "none"
    rows = x.new_empty(n_rows, dtype=loss_dtype if none else torch.float32)
    loss = rows if none else x.new_empty((), dtype=loss_dtype)
    lse = x.new_empty(n_rows, dtype=torch.float32)
    stats = x.new_empty((3, n_rows), dtype=torch.float32)
    dx = x.new_empty(x.shape if with_gradient else 0)
    if not probabilities:
        target = target.contiguous()
    if not mean:
        total = x.new_empty(0, dtype=torch.float32)
    elif probabilities:
        total = x.new_full((), n_rows, dtype=torch.float32)
    else:
        total = target_mass(target, weight, n_classes, ignore_index)
    if n_rows:
        forward_rows(
            x, target, weight, total, None, rows, lse, stats, None, None, dx if with_gradient else None,
            ignore_index, smoothing, softcap, scale, z_loss, mean,
        )  # fmt: skip
    if not none:
        _sum_into(loss, rows, total if mean else None)
    return loss, lse, stats, total, dx


def forward_rows(
    x, target, weight, total, factor, rows, lse, stats, hits, entropy, dx,
    ignore_index, smoothing, softcap, scale, z_loss, mean: bool,
):  # fmt: skip
    """Row losses, lse and statistics of :func:`cross_entropy_fwd` into ``rows``, ``lse``, ``stats``.

    ``hits`` and ``entropy``, (rows,) fp32 or None: 1 where no class has a larger logit than the target, for class
    indices; and softmax(z)'s entropy in nats.

    With ``dx`` (may be ``x``) also the gradient, over ``total`` for a mean and times ``factor`` (rows,) fp32 if given.
    """
    probabilities = target.is_floating_point()
    x3, t3 = merged(x, target) if probabilities else (*merged(x), target)
    n_classes = x3.shape[1]
    adjacent, block_m, block_n = tile(x3)
    if probabilities:
        adjacent = adjacent and t3.stride(1) == 1
    beside = weight is not None or softcap is not None or entropy is not None or (smoothing and x.dtype.itemsize > 2)
    if dx is not None and n_classes <= (min(ROW, ROW_BESIDE) if beside else ROW):
        block_n = next_power_of_2(n_classes)
    elements = block_m * block_n
    # 32 elements to a thread, in fp32 16 while there are threads.
    most = min(32, elements // (512 if x.dtype.itemsize > 2 else 1024))
    # Asserts are compiled in for this kernel alone; its integer arithmetic needs none of the overflow checks.
    asserts = dict(debug=True, sanitize_overflow=False) if x.is_cuda else {}
    _forward_kernel[(x3.shape[0] * triton.cdiv(x3.shape[2], block_m),)](
        x3, t3, weight, total, factor, rows, lse, stats, hits, entropy, dx,
        *x3.stride(), *(t3.stride() if probabilities else (0, 0, 0)), 0 if dx is None else dx.stride(0),
        x3.shape[2], lse.numel(), n_classes, ignore_index, smoothing, scale, softcap or 0.0, z_loss,
        PROBABILITIES=probabilities, HAS_WEIGHT=weight is not None, SMOOTHING=smoothing != 0.0,
        HAS_SCALE=scale != 1.0, HAS_CAP=softcap is not None, GRADIENT=dx is not None, MEAN=mean,
        HAS_FACTOR=factor is not None, ACCURACY=hits is not None, ENTROPY=entropy is not None,
        ADJACENT=adjacent, WHOLE=n_classes <= block_n,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=max(warps(elements), most), **OPTIONS, **asserts,
    )  # fmt: skip
