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
it reads rows of up to ROW classes once. Wider ones it reads twice, WIDE_TURN classes at a time, so that few rows are in
flight and the L2 cache still holds most of them at the second time.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..device import device_info
from ..launch import cdiv, keyed, launch_options, next_power_of_2, tuned
from ..math import block_count
from .logits import (
    EXACT,
    LogitPlane,
    LogitSizes,
    along,
    block_launch,
    class_weights,
    dlogits,
    effective,
    kernel_loss,
    logit_tile,
    merge_positions,
    negative_log_softmax,
    penalty,
    penalty_slope,
    warps_for,
)

# ROW: columns of the widest row that is held in registers. ROW_BESIDE: the same where something else is held too (class
# weights, the soft cap's slope, the entropy's terms). SUM_BLOCK: elements that a sum's program takes at a time. Nothing
# spills on sm_80, sm_90 and sm_100.
ROW = 32768
ROW_BESIDE = 8192
SUM_BLOCK = 4096
# Columns of a turn where a row is read twice, on sm_120 half as many. Two blocks of 16 warps fill a multiprocessor, and
# have as many bytes on their way as eight blocks of 4,096 columns, but 264 rows are in flight on an H200, not 1,056. Of
# the second read of 128,256 columns in 16 bits a simulated L2 cache of 50 MB serves 34 % and not 9 %; if it keeps what
# is loaded with "evict_last", 99 % and not 33 %. Not measured on a GPU.
WIDE_TURN = 16384


class RowOutputs(NamedTuple):
    """Where the forward writes, per position: loss, lse, (3, rows) statistics, and hits and entropy, if not None."""

    loss: Any
    lse: Any
    stats: Any
    hits: Any = None
    entropy: Any = None


class RowSums(NamedTuple):
    """What a row's blocks of classes sum, z less ``base`` throughout."""

    top: Any  # the maximum so far
    base: Any  # the same, or 0 while that is -inf: what z is taken against
    total: Any  # sum exp(z - base)
    mass: Any  # sum w q
    dot: Any  # sum w q (z - base)
    weights: Any  # sum w
    spread: Any  # sum w (z - base)
    tilt: Any  # sum exp(z - base) (z - base)


@triton.jit
def _accumulate(sums, x, q, weight, in_cols, loss, ENTROPY: tl.constexpr):
    """A block of classes into a row's sums, relative to the maximum so far; and z. ``q``: probabilities, or None."""
    z = tl.where(in_cols[None, :], effective(x, loss), float("-inf"))
    top = tl.maximum(sums.top, tl.max(z, axis=1))
    base = tl.where(top == float("-inf"), 0.0, top)
    shift = sums.base - base
    below = z - base[:, None]
    before = tl.exp(sums.top - base)
    total, mass, dot, weights, spread, tilt = sums.total, sums.mass, sums.dot, sums.weights, sums.spread, sums.tilt
    if ENTROPY:
        tilt = before * (tilt + shift * total)
        tilt += tl.sum(tl.where(below == float("-inf"), 0.0, tl.exp(below) * below), axis=1)
    total = total * before + tl.sum(tl.exp(below), axis=1)
    if q is not None:
        wq = q if weight is None else q * weight
        dot += shift * mass + tl.sum(tl.where(in_cols[None, :], wq * below, 0.0), axis=1)
        mass += tl.sum(wq, axis=1)
    if loss.smoothing is not None:
        wz = below if weight is None else weight * below
        spread += shift * weights + tl.sum(tl.where(in_cols[None, :], wz, 0.0), axis=1)
        weights += tl.sum(in_cols.to(tl.float32)) if weight is None else tl.sum(weight)
    return z, RowSums(top, base, total, mass, dot, weights, spread, tilt)


keyed(_accumulate)


@triton.jit
def _add_classes(
    sums, x_at, x_stride, target_at, target_stride, weight, cols, in_rows, n_classes, loss,
    ADJACENT: tl.constexpr, ENTROPY: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """(z, sums) with the classes ``cols`` of the logits at ``x_at`` and, where not None, the targets at ``target_at``.

    AGAIN: the logits are read a second time, and are to stay in the cache.
    """
    in_cols = cols < n_classes
    mask = in_rows[:, None] & in_cols[None, :]
    at = x_at[:, None] + along(cols, x_stride, ADJACENT)[None, :]
    logits = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last" if AGAIN else "")
    q = None
    if target_at is not None:
        at = target_at[:, None] + along(cols, target_stride, ADJACENT)[None, :]
        q = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return _accumulate(sums, logits, q, weight, in_cols, loss, ENTROPY)


@triton.jit
def _store_gradient(dx_at, cols, y, keep, in_rows, z, row, weight, factor, n_classes, loss):
    """The gradient of the classes ``cols`` for class indices ``y``; ``row`` is (base, rel, slope)."""
    base, rel, slope = row
    mask = in_rows[:, None] & (cols < n_classes)[None, :]
    q = (cols[None, :] == y[:, None]).to(tl.float32)
    p = tl.exp(-negative_log_softmax(z, base, rel))
    d = tl.where(keep[:, None], dlogits(p, q, z, slope[:, None], weight, factor, n_classes, loss), 0.0)
    tl.store(dx_at[:, None] + cols[None, :], d.to(dx_at.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_in_turns(
    dx_at, x_at, x_stride, y, keep, in_rows, row, weight_ptr, factor, n_classes, loss,
    ADJACENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """:func:`_store_gradient` of all classes, from the end: the cache still holds that if it does not hold the rows."""
    last = tl.cdiv(n_classes, BLOCK_N) - 1
    for turn in range(0, last + 1):
        cols = (last - turn) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_cols = cols < n_classes
        at = x_at[:, None] + along(cols, x_stride, ADJACENT)[None, :]
        mask = in_rows[:, None] & in_cols[None, :]
        z = effective(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"), loss)
        weight = class_weights(weight_ptr, cols, in_cols)
        _store_gradient(dx_at, cols, y, keep, in_rows, z, row, weight, factor, n_classes, loss)


@triton.jit
def _loss_and_slope(sums, mass, dot, rel, lse, n_classes, loss):
    """Of rows whose targets have the class weight ``mass`` and the weighted logit ``dot``, less the base."""
    row_loss = mass * rel - dot
    slope = mass
    if loss.smoothing is not None:
        share = loss.smoothing / n_classes
        row_loss = (1.0 - loss.smoothing) * row_loss + share * (sums.weights * rel - sums.spread)
        slope = (1.0 - loss.smoothing) * mass + share * sums.weights
    return row_loss + penalty(mass, lse, loss), slope + penalty_slope(mass, lse, loss)


keyed(_add_classes, _gradient_in_turns)


@triton.jit
def _forward_kernel(
    x, target, weight_ptr, total_ptr, factor_ptr, out, dx, sizes, loss,
    PROBABILITIES: tl.constexpr, ADJACENT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_inner, n_rows, n_classes = sizes
    blocks = block_count(n_inner, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = inner < n_inner
    rows = outer * n_inner + inner
    x_at = x.ptr + outer * x.outer + inner * x.inner
    target_at = None
    if PROBABILITIES:
        target_at = target.ptr + outer * target.outer + inner * target.inner
    else:
        y = tl.load(target.ptr + rows, mask=in_rows, other=0)
        keep = in_rows & (y != loss.ignore_index)
        known = (y >= 0) & (y < n_classes)
        tl.device_assert(known | ~keep, "cross_entropy: a target is neither ignore_index nor in [0, C)")
        hit = keep & known
        own = effective(tl.load(x_at + y.to(tl.int64) * x.classes, mask=hit, other=0.0), loss)
    ENTROPY: tl.constexpr = out.entropy is not None
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = RowSums(top, zeros, zeros, zeros, zeros, tl.cast(0.0, tl.float32), zeros, zeros)
    if WHOLE:
        cols = tl.arange(0, BLOCK_N)
        weight = class_weights(weight_ptr, cols, cols < n_classes)
        z, sums = _add_classes(
            sums, x_at, x.classes, target_at, target.classes, weight, cols, in_rows, n_classes, loss,
            ADJACENT, ENTROPY, AGAIN=False,
        )  # fmt: skip
    else:
        for start in range(0, n_classes, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            weight = class_weights(weight_ptr, cols, cols < n_classes)
            _, sums = _add_classes(
                sums, x_at, x.classes, target_at, target.classes, weight, cols, in_rows, n_classes, loss,
                ADJACENT, ENTROPY, AGAIN=dx is not None,
            )  # fmt: skip
    base = sums.base
    rel = tl.log(sums.total)
    lse = base + rel
    mass, dot = sums.mass, sums.dot
    if not PROBABILITIES:
        dot = own - base
        if weight_ptr is not None:
            mass = tl.load(weight_ptr + y, mask=hit, other=0.0).to(tl.float32)
            dot *= mass
        else:
            mass = hit.to(tl.float32)
        dot = tl.where(known, dot, float("nan"))  # where asserts are compiled out, a bad target shows as NaN
    row_loss, slope = _loss_and_slope(sums, mass, dot, rel, lse, n_classes, loss)
    if not PROBABILITIES:
        slope = tl.where(keep, tl.where(known, slope, float("nan")), 0.0)
        row_loss = tl.where(keep, row_loss, 0.0)
    tl.store(out.loss + rows, row_loss.to(out.loss.dtype.element_ty), mask=in_rows)
    tl.store(out.lse + rows, lse, mask=in_rows)
    tl.store(out.stats + rows, base, mask=in_rows)
    tl.store(out.stats + n_rows + rows, rel, mask=in_rows)
    tl.store(out.stats + n_rows + n_rows + rows, slope, mask=in_rows)
    if out.hits is not None:
        tl.store(out.hits + rows, (hit & (own >= sums.top)).to(tl.float32), mask=in_rows)
    if out.entropy is not None:
        tl.store(out.entropy + rows, rel - sums.tilt / sums.total, mask=in_rows)
    if dx is not None:
        dx_at = dx.ptr + inner * dx.outer
        factor = 1.0 / tl.load(total_ptr) if total_ptr is not None else 1.0
        if factor_ptr is not None:
            factor *= tl.load(factor_ptr + rows, mask=in_rows, other=0.0)[:, None]
        row = (base, rel, slope)
        if WHOLE:
            _store_gradient(dx_at, cols, y, keep, in_rows, z, row, weight, factor, n_classes, loss)
        else:
            _gradient_in_turns(
                dx_at, x_at, x.classes, y, keep, in_rows, row, weight_ptr, factor, n_classes, loss, ADJACENT, BLOCK_N
            )


@triton.jit
def _mass_kernel(target_ptr, weight_ptr, sums_ptr, n_rows, n_classes, ignore_index, BLOCK: tl.constexpr):
    """Each program's share of the class weights of the targets that are not ignored."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), block_count(n_rows, BLOCK), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(target_ptr + rows, mask=rows < n_rows, other=ignore_index)
        hit = (rows < n_rows) & (y != ignore_index) & (y >= 0) & (y < n_classes)
        mass += (
            tl.load(weight_ptr + y, mask=hit, other=0.0).to(tl.float32)
            if weight_ptr is not None
            else hit.to(tl.float32)
        )
    tl.store(sums_ptr + tl.program_id(0), tl.sum(mass, axis=0))


@triton.jit
def _sum_kernel(x_ptr, total_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    """Each program's share of the sum, over ``total`` where that is given: a mean over nothing is NaN, as in torch."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), block_count(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + at, mask=at < n, other=0.0)
    result = tl.sum(acc, axis=0)
    if total_ptr is not None:
        total = tl.load(total_ptr)
        result = tl.where(total == 0.0, float("nan"), result / tl.where(total == 0.0, 1.0, total))
    tl.store(sums_ptr + tl.program_id(0), result.to(sums_ptr.dtype.element_ty))


def _sum_launch(kernel: str, x: torch.Tensor) -> tuple[int, dict]:
    """(programs, constants and options) of a sum over ``x``: so few that one program can add up what they leave."""
    block, options = block_launch(kernel, x, SUM_BLOCK)
    return max(1, min(cdiv(x.numel(), block), 128)), dict(BLOCK=block, **options)


def _sum_into(out, x, total=None):
    """The sum of the fp32 vector ``x``, over ``total`` where given, into the scalar ``out``; in a fixed order."""
    programs, options = _sum_launch("cross_entropy_sum", x)
    if programs > 1:
        parts = x.new_empty(programs)
        _sum_kernel[(programs,)](x, None, parts, x.numel(), **options)
        return _sum_into(out, parts, total)
    _sum_kernel[(1,)](x, total, out, x.numel(), **options)


def target_mass(target, weight, n_classes: int, ignore_index: int):
    """() fp32: the sum of the class weights of targets that are not ignored, which a mean divides by."""
    total = torch.empty((), dtype=torch.float32, device=target.device)
    programs, options = _sum_launch("cross_entropy_mass", target)
    parts = total if programs == 1 else total.new_empty(programs)
    _mass_kernel[(programs,)](target, weight, parts, target.numel(), n_classes, ignore_index, **options)
    if programs > 1:
        _sum_into(total, parts)
    return total


def cross_entropy_fwd(labelled, loss_dtype, with_gradient=False):
    """The loss of logits (B, C, S) and what the backward needs.

    Args:
        labelled: fields ``logits`` (B, C, S); ``target``, (B, S) int64 class indices or (B, C, S) floating class
            probabilities; ``weight``, (C,) contiguous, or None; ``loss``, the options.
        with_gradient: also leave the gradient of the loss in the logits, as if its own upstream gradient were 1.
            For class indices and S = 1 with adjacent classes.

    Returns:
        loss: scalar, or (B * S,) for "none", in ``loss_dtype``.
        lse: (B * S,) fp32.
        stats: (3, B * S) fp32, for the backward.
        total: () fp32, the mean's denominator; empty for the other reductions.
        dlogits: as the logits, contiguous; empty unless asked for.
    """
    x, target, weight, loss = labelled
    n_rows, n_classes = x.shape[0] * x.shape[2], x.shape[1]
    mean, none = loss.reduction == "mean", loss.reduction == "none"
    rows = x.new_empty(n_rows, dtype=loss_dtype if none else torch.float32)
    value = rows if none else x.new_empty((), dtype=loss_dtype)
    out = RowOutputs(rows, x.new_empty(n_rows, dtype=torch.float32), x.new_empty((3, n_rows), dtype=torch.float32))
    dx = x.new_empty(x.shape if with_gradient else 0)
    if not mean:
        total = None
    elif target.is_floating_point():
        total = x.new_full((), n_rows, dtype=torch.float32)
    else:
        total = target_mass(target.contiguous(), weight, n_classes, loss.ignore_index)
    if n_rows:
        forward_rows(labelled, out, total, None, dx if with_gradient else None)
    if not none:
        _sum_into(value, rows, total)
    return value, out.lse, out.stats, x.new_empty(0, dtype=torch.float32) if total is None else total, dx


def forward_rows(labelled, out: RowOutputs, total=None, factor=None, dx=None):
    """Row losses, lse and statistics of :func:`cross_entropy_fwd` into ``out``.

    ``out.hits`` and ``out.entropy``, (rows,) fp32 or None: 1 where no class has a larger logit than the target, for
    class indices; and softmax(z)'s entropy in nats.

    With ``dx`` (may be the logits) also the gradient, over ``total`` and times ``factor`` (rows,) fp32, if given.
    """
    x, target, weight, loss = labelled
    probabilities = target.is_floating_point()
    x3, t3 = merge_positions(x, target) if probabilities else (*merge_positions(x), target.contiguous())
    n_classes = x3.shape[1]
    adjacent, block_m, block_n = logit_tile(x3)
    if probabilities:
        adjacent = adjacent and t3.stride(1) == 1
    smoothed_wide = loss.label_smoothing != 0.0 and x.dtype.itemsize > 2
    beside = weight is not None or loss.softcap is not None or out.entropy is not None or smoothed_wide
    if dx is not None and n_classes <= (min(ROW, ROW_BESIDE) if beside else ROW):
        block_n = next_power_of_2(n_classes)
    # 32 elements to a thread, in fp32 16 while there are threads. On sm_120 64 elements to each of half the threads: 32
    # to a thread of 32 warps spill 4, in fp32 6.
    limit = 16 if device_info(x.device).arch >= 120 else 32
    # With class weights and every option at once such tiles spill 3 on sm_100 in fp32, on gfx1100 4.
    wide = dx is not None and n_classes > ROW and weight is None
    if wide:
        block_n = min(WIDE_TURN, limit * 512)
    elements = block_m * block_n
    most = min(limit, elements // (512 if x.dtype.itemsize > 2 else 1024))
    # Beside the entropy's terms 16 elements to a thread spill on sm_90: 144 bytes with Triton 3.9, 80 with 3.6.
    tile_warps = warps_for(elements if out.entropy is None else 2 * elements)
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=max(16 if wide else tile_warps, most))
    key = (adjacent, block_m, block_n, x.element_size(), dx is not None)
    settings = tuned("cross_entropy_fwd", x.device, key, settings)
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    # Asserts are compiled in for this kernel alone; its integer arithmetic needs none of the overflow checks.
    asserts = dict(debug=True, sanitize_overflow=False) if x.is_cuda else {}
    _forward_kernel[(x3.shape[0] * cdiv(x3.shape[2], block_m),)](
        LogitPlane(x3, *x3.stride()), LogitPlane(t3, *(t3.stride() if probabilities else (0, 0, 0))),
        weight, total, factor, out, None if dx is None else LogitPlane(dx, dx.stride(0), 1, 0),
        LogitSizes(x3.shape[2], out.lse.numel(), n_classes), kernel_loss(loss),
        PROBABILITIES=probabilities, ADJACENT=adjacent, WHOLE=n_classes <= block_n, BLOCK_M=block_m, BLOCK_N=block_n,
        **launch_options(x.device, num_warps=settings["num_warps"], **EXACT, **asserts),
    )  # fmt: skip
