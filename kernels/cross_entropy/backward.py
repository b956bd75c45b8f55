"""Cross-entropy's backward: tiles of the gradient, each on its own, from the statistics that the forward left."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch_options, processor_count, tuned
from ..math import block_count
from ..sizes import GRID_SIDE
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
    through_transform,
    warps_for,
)

# Elements to a turn of the rescaling, 16 to a thread; eight such programs fill a multiprocessor.
SCALE_TILE = 4096


class RowGradients(NamedTuple):
    """The gradients of the loss, ``stride`` elements a position, of lse and of the entropy; an absent one is None."""

    loss: Any
    stride: int
    lse: Any
    entropy: Any


class BackwardInputs(NamedTuple):
    """What the forward left: (3, rows) statistics, the mean's denominator and the entropy, or None."""

    stats: Any
    total: Any
    entropy: Any


@triton.jit
def _backward_kernel(
    upstream, x, target, weight_ptr, left, dx, dtarget, sizes, loss,
    PROBABILITIES: tl.constexpr, ROUND_FIRST: tl.constexpr, ADJACENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_inner, n_rows, n_classes = sizes
    blocks = block_count(n_inner, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    inner = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = inner < n_inner
    rows = outer * n_inner + inner
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_classes
    mask = in_rows[:, None] & in_cols[None, :]
    at = outer * x.outer + (inner * x.inner)[:, None] + along(cols, x.classes, ADJACENT)[None, :]
    z = effective(tl.load(x.ptr + at, mask=mask, other=0.0), loss)
    base = tl.load(left.stats + rows, mask=in_rows, other=0.0)
    rel = tl.load(left.stats + n_rows + rows, mask=in_rows, other=0.0)
    nll = negative_log_softmax(z, base, rel)
    p = tl.exp(-nll)
    keep = in_rows
    weight = class_weights(weight_ptr, cols, in_cols)
    if upstream.loss is not None:
        dloss = tl.load(upstream.loss + rows * upstream.stride, mask=in_rows, other=0.0).to(tl.float32)
        share = 1.0 / tl.load(left.total) if left.total is not None else 1.0
        if PROBABILITIES:
            at = outer * target.outer + (inner * target.inner)[:, None]
            at += along(cols, target.classes, ADJACENT)[None, :]
            q = tl.load(target.ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            y = tl.load(target.ptr + rows, mask=in_rows, other=0)
            keep = in_rows & (y != loss.ignore_index)
            q = (cols[None, :] == y[:, None]).to(tl.float32)
    if dx is not None:
        d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if upstream.loss is not None:
            slope = tl.load(left.stats + n_rows + n_rows + rows, mask=in_rows, other=0.0)[:, None]
            factor = share if ROUND_FIRST else (dloss * share)[:, None]
            d = dlogits(p, q, z, slope, weight, factor, n_classes, loss)
            if ROUND_FIRST:
                # As the forward's own gradient, rounded before the upstream's factor: both ways agree bit for bit.
                d = d.to(dx.ptr.dtype.element_ty).to(tl.float32) * dloss[:, None]
            d = tl.where(keep[:, None], d, 0.0)
        if upstream.lse is not None:
            dlse = tl.load(upstream.lse + rows, mask=in_rows, other=0.0).to(tl.float32)
            d += through_transform(p * dlse[:, None], z, loss)
        if upstream.entropy is not None:
            dentropy = tl.load(upstream.entropy + rows, mask=in_rows, other=0.0)
            entropy = tl.load(left.entropy + rows, mask=in_rows, other=0.0)
            dz = tl.where(p == 0.0, 0.0, p * (nll - entropy[:, None]) * dentropy[:, None])
            d += through_transform(dz, z, loss)
        at = outer * dx.outer + (inner * dx.inner)[:, None] + along(cols, dx.classes, ADJACENT)[None, :]
        tl.store(dx.ptr + at, d.to(dx.ptr.dtype.element_ty), mask=mask)
    if dtarget is not None:
        dt = nll if loss.smoothing is None else (1.0 - loss.smoothing) * nll
        dt += penalty(1.0, base + rel, loss)[:, None]
        if weight is not None:
            dt *= weight
        dt *= (dloss * share)[:, None]
        at = outer * dtarget.outer + (inner * dtarget.inner)[:, None] + along(cols, dtarget.classes, ADJACENT)[None, :]
        tl.store(dtarget.ptr + at, dt.to(dtarget.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(dx_ptr, dloss_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(dloss_ptr).to(tl.float32)
    # Mostly 1, and then nothing is moved. Read on the device: the host does not wait for it.
    if factor != 1.0:
        for block in range(tl.program_id(0), block_count(n, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            dx = tl.load(dx_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            # An ignored row stays exactly 0 even where the upstream gradient is NaN.
            dx = tl.where(dx == 0.0, 0.0, dx * factor)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)


def cross_entropy_bwd(upstream, labelled, statistics, needs, out=None):
    """(dlogits, dtarget) as logits and target; one that ``needs`` does not ask for is an empty tensor.

    Args:
        upstream: fields ``loss``, a scalar or (B * S,); ``lse`` (B * S,); ``entropy`` (B * S,) fp32. Each may be None.
        labelled: as in :func:`.forward.cross_entropy_fwd`.
        statistics: what that left: fields ``rows`` (3, B * S), ``total`` for a mean, ``entropy`` for its gradient.
        out: receives dlogits, and may be the logits: a tile is read before it is written.
    """
    x, target, weight, loss = labelled
    need_dx, need_dtarget = needs
    probabilities = target.is_floating_point()
    dx = out if out is not None else torch.empty_like(x) if need_dx else x.new_empty(0)
    dtarget = torch.empty_like(target) if need_dtarget else target.new_empty(0)
    n_rows = x.shape[0] * x.shape[2]
    if n_rows == 0:
        return dx, dtarget
    dloss, dlse, dentropy = upstream
    if dloss is None and need_dtarget:
        dtarget.zero_()
        need_dtarget = False
    views = [x, dx if need_dx else x, target if probabilities else x, dtarget if need_dtarget else x]
    x3, dx3, t3, dt3 = merge_positions(*views)
    adjacent, block_m, block_n = logit_tile(x3)
    adjacent = adjacent and all(t.stride(1) == 1 for t in (dx3, t3, dt3))
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps_for(block_m * block_n))
    settings = tuned("cross_entropy_bwd", x.device, (adjacent, block_m, block_n, x.element_size()), settings)
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    # More classes to a block where a grid has no room for their blocks. A tile sums nothing, so bits stay the same.
    while block_m > 1 and cdiv(x3.shape[1], block_n) > GRID_SIDE:
        block_m, block_n = block_m // 2, block_n * 2
    if dloss is not None and dloss.dim():
        dloss = dloss.contiguous()
    _backward_kernel[(x3.shape[0] * cdiv(x3.shape[2], block_m), cdiv(x3.shape[1], block_n))](
        RowGradients(
            dloss, 0 if dloss is None or not dloss.dim() else 1, None if dlse is None else dlse.contiguous(), dentropy
        ),
        LogitPlane(x3, *x3.stride()), LogitPlane(t3 if probabilities else target.contiguous(), *t3.stride()), weight,
        BackwardInputs(statistics.rows, statistics.total if loss.reduction == "mean" else None, statistics.entropy),
        LogitPlane(dx3, *dx3.stride()) if need_dx else None, LogitPlane(dt3, *dt3.stride()) if need_dtarget else None,
        LogitSizes(x3.shape[2], n_rows, x3.shape[1]), kernel_loss(loss),
        PROBABILITIES=probabilities, ROUND_FIRST=x.dtype == torch.bfloat16 or x.dtype == torch.float32,
        ADJACENT=adjacent, BLOCK_M=block_m, BLOCK_N=block_n, 
        **launch_options(x.device, num_warps=settings["num_warps"], **EXACT),
    )  # fmt: skip
    return dx, dtarget


def scale_gradient(dx, dloss):
    """``dx``, contiguous, times the scalar ``dloss``, in place."""
    if dx.numel():
        block, options = block_launch("cross_entropy_scale", dx, SCALE_TILE)
        programs = min(cdiv(dx.numel(), block), 8 * processor_count(dx.device))
        _scale_kernel[(programs,)](dx, dloss, dx.numel(), BLOCK=block, **options)
