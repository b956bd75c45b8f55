"""Rows of logits on a CPU by the extension (csrc/cpu/cross_entropy.cpp): loss and gradient while a row is in the cache.

The functions are those of kernels/cross_entropy/forward.py and backward.py, with their arguments. They differ in
that the backward computes everything anew and needs no statistics, and that fp64 is taken too.
"""

from __future__ import annotations

import torch

from ... import extension
from .loss import REDUCTIONS, Labelled, row_out_of_range


def _rows_fake(x, target, *others):
    wide, wanted = accumulator(x, target), others[-2:]
    return tuple(x.new_empty(n, dtype=wide) for n in (len(x), len(x), *(len(x) if on else 0 for on in wanted)))


def _loss_fake(x, target, weight, reduction, dtype, *others):
    need_lse, need_x = others[-2:]
    return (
        -1,
        1.0,
        x.new_empty(len(x) if reduction == 0 else (), dtype=dtype),
        x.new_empty(len(x), dtype=accumulator(x, target)) if need_lse else None,
        x.new_empty(x.shape) if need_x else None,
    )


_rows = extension.operator("cross_entropy_rows", _rows_fake)
_loss = extension.operator("cross_entropy_loss", _loss_fake)
# (x, target, ignore_index, number of the reduction, whether to give the gradient) -> (the first row whose target is no
# class, or -1, loss in x's dtype, gradient of x for an upstream gradient of 1 or no elements), of an ordinary call.
extension.operator(
    "cross_entropy_of_classes",
    lambda x, target, ignore_index, reduction, need_x: (
        -1, x.new_empty(len(x) if reduction == 0 else ()), x.new_empty(x.shape if need_x else 0)
    ),
)  # fmt: skip
# (x, target, gradient of that loss, ignore_index, number of the reduction) -> gradient of x. That of the loss is one
# number, None for 1, or of a loss a row contiguous and in the accumulator's dtype.
extension.operator("cross_entropy_of_classes_grad", lambda x, target, *others: x.new_empty(x.shape))
REDUCTION_NUMBER = {name: number for number, name in enumerate(REDUCTIONS)}


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
        return self.whole if self.rows.data_ptr() == self.whole.data_ptr() else _from_rows(self.rows, self.whole)


def _from_rows(rows, whole):
    """``whole`` (B, C, S), and in it what ``rows`` (B * S, C) has."""
    batch, classes, positions = whole.shape
    return whole.copy_(rows.view(batch, positions, classes).movedim(2, 1))


def _in_rows(labelled: Labelled) -> Labelled:
    x, target, weight, loss = labelled
    return Labelled(_flat(x), _flat(target) if target.is_floating_point() else target.reshape(-1), weight, loss)


def native_cross_entropy_fwd(labelled: Labelled, loss_dtype: torch.dtype, with_gradient: bool = False):
    """(loss, logsumexp, statistics, what a mean divides by, gradient of the logits), as the operator gives them.

    IndexError: a target is no class.
    """
    x, _, weight, loss = labelled
    rows, wide = _in_rows(labelled), torch.promote_types(x.dtype, torch.float32)
    if rows.target.is_floating_point():
        value, lse, _, _ = native_row_losses(rows, (None, None, None))
        total, dx = len(rows.logits), None
        if loss.reduction != "none":
            value = value.sum() / total if loss.reduction == "mean" else value.sum()
    else:
        bad, total, value, lse, dx = _loss(
            rows.logits, rows.target, None if weight is None else weight.to(wide).contiguous(),
            REDUCTION_NUMBER[loss.reduction], loss_dtype, loss.ignore_index, loss.label_smoothing, loss.softcap or 0.0,
            loss.logit_scale, loss.z_loss, True, with_gradient,
        )  # fmt: skip
        if bad >= 0:
            raise row_out_of_range(rows.target, loss.ignore_index, x.shape[1], "cross_entropy") or AssertionError(bad)
    total = x.new_full((), total, dtype=wide) if loss.reduction == "mean" else x.new_empty(0, dtype=wide)
    if dx is None:
        dlogits = x.new_empty(0)
    else:
        dlogits = dx.unsqueeze(2) if x.shape[2] == 1 else _from_rows(dx, x.new_empty(x.shape))
    return value.to(loss_dtype), lse.to(wide), x.new_empty((3, 0), dtype=torch.float32), total, dlogits


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
