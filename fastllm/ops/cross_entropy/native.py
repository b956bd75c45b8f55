"""Rows of logits on a CPU by the extension (csrc/cpu/cross_entropy.cpp): loss and gradient while a row is in the cache.

The functions are those of kernels/cross_entropy/forward.py and backward.py, with their arguments. They differ in
that the backward computes everything anew and needs no statistics, and that fp64 is taken too.
"""

from __future__ import annotations

import torch

from ... import extension
from .loss import Labelled


def _rows_fake(x, target, *others):
    wide, wanted = accumulator(x, target), others[-2:]
    return tuple(x.new_empty(n, dtype=wide) for n in (len(x), len(x), *(len(x) if on else 0 for on in wanted)))


_rows = extension.operator("cross_entropy_rows", _rows_fake)


def accumulator(x, target) -> torch.dtype:
    """What rows are computed in: fp32, or fp64 where logits or probabilities are."""
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def native_row_losses(labelled: Labelled, upstream, into=(None, None), wanted=(False, False)):
    """(loss, lse, hits, entropy) of logits (R, C), in fp32 or fp64; the last two empty where not ``wanted``.

    ``into``: where the gradients of logits (may be the logits themselves) and of probabilities go, or Nones. They are
    those for ``upstream``, the gradients (R,) of each row's loss, lse and entropy; a None adds nothing.
    """
    x, target, weight, loss = labelled
    wide = accumulator(x, target)
    weight = None if weight is None else weight.to(wide).contiguous()
    upstream = (None if t is None else t.to(wide).contiguous() for t in upstream)
    return _rows(
        x, target, weight, *upstream, *into, loss.ignore_index, loss.label_smoothing, loss.softcap or 0.0,
        loss.logit_scale, loss.z_loss, *wanted,
    )  # fmt: skip


def _flat(t):
    """(B, C, S) -> (B * S, C), a view where it can be."""
    return t.squeeze(2) if t.shape[2] == 1 else t.movedim(1, 2).flatten(0, 1)


class _Out:
    """``rows`` to write a gradient into, and the gradient ``finished``, (B, C, S): ``out``, or a tensor as ``like``."""

    def __init__(self, like, out=None):
        self.whole = torch.empty_like(like) if out is None else out
        view = self.whole.shape[2] == 1 and (self.whole.shape[1] <= 1 or self.whole.stride(1) == 1)
        self.rows = self.whole.squeeze(2) if view else like.new_empty(like.shape[0] * like.shape[2], like.shape[1])

    def finished(self):
        if self.rows.data_ptr() != self.whole.data_ptr():
            batch, classes, positions = self.whole.shape
            self.whole.copy_(self.rows.view(batch, positions, classes).movedim(2, 1))
        return self.whole


def _in_rows(labelled: Labelled) -> Labelled:
    x, target, weight, loss = labelled
    return Labelled(_flat(x), _flat(target) if target.is_floating_point() else target.reshape(-1), weight, loss)


def _total(labelled: Labelled):
    """What a mean divides by: the number of rows, or the sum of the class weights of targets that are not ignored."""
    x, target, weight, loss = labelled
    wide = torch.promote_types(x.dtype, torch.float32)
    if target.is_floating_point():
        return x.new_full((), x.shape[0] * x.shape[2], dtype=wide)
    keep = target != loss.ignore_index
    mass = keep.to(wide) if weight is None else weight.to(wide)[torch.where(keep, target, 0)] * keep
    return mass.sum()


def native_cross_entropy_fwd(labelled: Labelled, loss_dtype: torch.dtype, with_gradient: bool = False):
    """(loss, logsumexp, statistics, what a mean divides by, gradient of the logits), as the operator gives them."""
    x, reduction = labelled.logits, labelled.loss.reduction
    n_rows = x.shape[0] * x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = _total(labelled) if reduction == "mean" else x.new_empty(0, dtype=wide)
    factor = None
    if with_gradient:
        factor = (1 / total if reduction == "mean" else total.new_ones(())).expand(n_rows)
    out = _Out(x, x.new_empty(x.shape)) if with_gradient else None
    losses, lse, _, _ = native_row_losses(
        _in_rows(labelled), (factor, None, None), (None if out is None else out.rows, None)
    )
    loss = losses if reduction == "none" else losses.sum() / total if reduction == "mean" else losses.sum()
    dlogits = x.new_empty(0) if out is None else out.finished()
    return loss.to(loss_dtype), lse.to(wide), x.new_empty((3, 0), dtype=torch.float32), total, dlogits


def native_cross_entropy_bwd(upstream, labelled: Labelled, statistics, needs, out=None):
    """(gradient of the logits, of the target), empty where not needed; ``out`` may take the first."""
    x, target, _, loss = labelled
    n_rows = x.shape[0] * x.shape[2]
    need_dx, need_dtarget = needs
    dx = _Out(x, out) if need_dx else None
    dtarget = _Out(target) if need_dtarget else None
    dloss = upstream.loss
    factor = scale_last = None
    if dloss is not None:
        # As the forward's own gradient, which is rounded before the upstream's factor: both ways agree bit for bit.
        scale_last = upstream.lse is None and loss.reduction != "none" and not need_dtarget and x.dtype != torch.float16
        factor = torch.ones_like(dloss) if scale_last else dloss
        if loss.reduction == "mean":
            factor = factor / statistics.total
        factor = factor.expand(n_rows)
    native_row_losses(
        _in_rows(labelled), (factor, upstream.lse, None),
        (None if dx is None else dx.rows, None if dtarget is None else dtarget.rows),
    )  # fmt: skip
    if scale_last and dx is not None:
        native_scale_gradient(dx.rows, dloss)
    return tuple(t.new_empty(0) if given is None else given.finished() for t, given in ((x, dx), (target, dtarget)))


def native_scale_gradient(dx, dloss):
    """``dx`` times the scalar ``dloss``, in place; what is 0 stays so whatever the factor."""
    if dloss.item() == 1:
        return
    zeros = None if dloss.isfinite() else dx == 0
    dx.mul_(dloss)
    if zeros is not None:
        dx.masked_fill_(zeros, 0)
