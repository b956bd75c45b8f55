"""Rows of logits on a CPU by the extension (csrc/cpu/cross_entropy.cpp): loss and gradient while a row is in the cache.

The functions are those of kernels/cross_entropy/forward.py and backward.py, with their arguments. They differ in
that the backward computes everything anew and needs no statistics, and that fp64 is taken too.
"""

from __future__ import annotations

import torch

from ... import extension


def _rows_fake(x, target, weight, factor, dlse, dentropy, dx, dtarget, *options):
    wide = accumulator(x, target)
    return tuple(x.new_empty(n, dtype=wide) for n in (len(x), len(x), *(len(x) if on else 0 for on in options[-2:])))


_rows = extension.operator("cross_entropy_rows", _rows_fake)


def accumulator(x, target) -> torch.dtype:
    """What rows are computed in: fp32, or fp64 where logits or probabilities are."""
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def rows(
    x, target, weight, ignore_index, smoothing, softcap, scale, z_loss, *,
    factor=None, dlse=None, dentropy=None, dx=None, dtarget=None, accuracy=False, entropy=False,
):  # fmt: skip
    """(loss, lse, hits, entropy) of logits ``x`` (R, C), in fp32 or fp64; the last two empty unless asked for.

    ``target`` (R,) int64 or (R, C) floating point. With ``dx`` (may be ``x``) and ``dtarget`` their gradients for
    ``factor``, ``dlse`` and ``dentropy`` (R,), what each row's loss, lse and entropy count; None counts nothing.
    """
    wide = accumulator(x, target)
    weight = None if weight is None else weight.to(wide).contiguous()
    upstream = (None if t is None else t.to(wide).contiguous() for t in (factor, dlse, dentropy))
    return _rows(
        x, target, weight, *upstream, dx, dtarget, ignore_index, smoothing, softcap or 0.0, scale, z_loss, accuracy,
        entropy,
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


def _target(target):
    return _flat(target) if target.is_floating_point() else target.reshape(-1)


def _total(x, target, weight, ignore_index):
    """What a mean divides by: rows, or the class weights of the targets that count."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if target.is_floating_point():
        return x.new_full((), x.shape[0] * x.shape[2], dtype=wide)
    keep = target != ignore_index
    mass = keep.to(wide) if weight is None else weight.to(wide)[torch.where(keep, target, 0)] * keep
    return mass.sum()


def cross_entropy_fwd(
    x, target, weight, ignore_index, smoothing, softcap, scale, z_loss, reduction, loss_dtype, with_gradient=False
):  # fmt: skip
    n_rows = x.shape[0] * x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = _total(x, target, weight, ignore_index) if reduction == "mean" else x.new_empty(0, dtype=wide)
    factor = None
    if with_gradient:
        factor = (1 / total if reduction == "mean" else total.new_ones(())).expand(n_rows)
    out = _Out(x, x.new_empty(x.shape)) if with_gradient else None
    losses, lse, _, _ = rows(
        _flat(x), _target(target), weight, ignore_index, smoothing, softcap, scale, z_loss,
        factor=factor, dx=None if out is None else out.rows,
    )  # fmt: skip
    loss = losses if reduction == "none" else losses.sum() / total if reduction == "mean" else losses.sum()
    dlogits = x.new_empty(0) if out is None else out.finished()
    return loss.to(loss_dtype), lse.to(wide), x.new_empty((3, 0), dtype=torch.float32), total, dlogits


def cross_entropy_bwd(
    dloss, dlse, x, target, weight, stats, total,
    ignore_index, smoothing, softcap, scale_, z_loss, reduction, needs, out=None,
):  # fmt: skip
    n_rows = x.shape[0] * x.shape[2]
    need_dx, need_dtarget = needs
    dx = _Out(x, out) if need_dx else None
    dtarget = _Out(target) if need_dtarget else None
    factor = scale_last = None
    if dloss is not None:
        # As the forward's own gradient, which is rounded before the upstream's factor: both ways agree bit for bit.
        scale_last = dlse is None and reduction != "none" and not need_dtarget and x.dtype != torch.float16
        factor = torch.ones_like(dloss) if scale_last else dloss
        if reduction == "mean":
            factor = factor / total
        factor = factor.expand(n_rows)
    rows(
        _flat(x), _target(target), weight, ignore_index, smoothing, softcap, scale_, z_loss, factor=factor, dlse=dlse,
        dx=None if dx is None else dx.rows, dtarget=None if dtarget is None else dtarget.rows,
    )  # fmt: skip
    if scale_last:
        scale(dx.rows, dloss)
    return tuple(t.new_empty(0) if given is None else given.finished() for t, given in ((x, dx), (target, dtarget)))


def scale(dx, dloss):
    """``dx`` times the scalar ``dloss``, in place; what is 0 stays so whatever the factor."""
    if dloss == 1:
        return
    zeros = None if dloss.isfinite() else dx == 0
    dx.mul_(dloss)
    if zeros is not None:
        dx.masked_fill_(zeros, 0)
