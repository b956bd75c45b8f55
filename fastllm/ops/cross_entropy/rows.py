"""The losses of a chunk's rows, with the gradient written over the logits: linear_cross_entropy's inner step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .loss import Labelled, Loss
from .native import native_row_losses
from .operator import LossGradients, RowStatistics


class Extras(NamedTuple):
    """What is computed of each row beside loss and lse."""

    accuracy: bool = False
    entropy: bool = False


def eager_row_losses(labelled: Labelled, upstream: LossGradients, wanted: Extras):
    """(loss, lse, accuracy, entropy) of the logits (rows, V), in at least fp32; the logits are overwritten.

    They are overwritten with their gradient for ``upstream``, if that has one for the loss. Accuracy or entropy is
    None where not ``wanted``.
    """
    z, y, weight, loss = labelled
    n_classes = z.shape[1]
    keep = y != loss.ignore_index
    index = torch.where(keep, y, 0).unsqueeze(1)
    smoothing, share = loss.label_smoothing, loss.label_smoothing / n_classes
    slope_of_cap = _scale_and_cap(z, loss, back=upstream.loss is not None)
    top, own = z.amax(1), z.gather(1, index).squeeze(1)
    accuracy = (keep & (own >= top)).to(z.dtype) if wanted.accuracy else None
    # log p is needed only where it is summed. Otherwise p is computed at once, which saves a pass.
    logs = smoothing != 0.0 or wanted.entropy
    (torch.log_softmax if logs else torch.softmax)(z, 1, out=z)
    rel = -z.amax(1) if logs else _log_sum(z, index, own - top)
    lse = top + rel
    mass = keep.to(z.dtype) if weight is None else weight[index.squeeze(1)].to(z.dtype) * keep
    losses = mass * (rel + (top - own))
    slope = mass
    if smoothing != 0.0:
        spread = z.sum(1) if weight is None else z @ weight.to(z.dtype)
        losses = (1 - smoothing) * losses - share * spread
        slope = (1 - smoothing) * mass + share * (n_classes if weight is None else weight.sum().to(z.dtype))
    if loss.has_penalty:
        losses = losses + loss.penalty(mass, lse)
        slope = slope + loss.penalty_slope(mass, lse)
    losses = torch.where(keep, losses, 0)
    entropy = tilt = None
    if wanted.entropy:
        entropy, tilt = _entropy(z, upstream.entropy)
    if upstream.loss is None:
        return losses, lse, accuracy, entropy
    factor = torch.where(keep, upstream.loss, 0)
    along = factor * slope if upstream.lse is None else factor * slope + upstream.lse
    along = torch.where(along == 0, 0, along).unsqueeze(1)
    (z.exp_() if logs else z).mul_(along if tilt is None else tilt.add_(along))
    z.scatter_add_(1, index, (-(1 - smoothing) * factor * mass).unsqueeze(1))
    if smoothing != 0.0:
        ones = z.new_ones(n_classes) if weight is None else weight.to(z.dtype)
        z.addr_(factor, ones, alpha=-share)
    if slope_of_cap is not None:
        z.mul_(slope_of_cap)
    if loss.logit_scale != 1.0:
        z.mul_(loss.logit_scale)
    return losses, lse, accuracy, entropy


def _scale_and_cap(z, loss: Loss, *, back: bool):
    """Scales the logits ``z`` and caps them, in place; the slope of the cap where a gradient goes ``back``."""
    if loss.logit_scale != 1.0:
        z.mul_(loss.logit_scale)
    if loss.softcap is None:
        return None
    z.div_(loss.softcap).tanh_()
    slope = (1 - z.square()) if back else None
    z.mul_(loss.softcap)
    return slope


def _entropy(log_p, upstream):
    """(entropy of each row, what it adds to the gradient of its logits for ``upstream``, over p; None without)."""
    p = log_p.exp()
    entropy = torch.special.entr(p, out=p).sum(1)
    if upstream is None:
        return entropy, None
    torch.add(log_p, entropy.unsqueeze(1), out=p)
    return entropy, p.masked_fill_(log_p == -math.inf, 0).mul_(-upstream.unsqueeze(1))


def _log_sum(p, index, below):
    """log sum exp(z - top) of each row of p = softmax(z), where ``below`` is z - top at ``index``."""
    # Every p is exp(z - top) / sum. The p at ``index`` gives the sum without a pass over p, unless it is near 0. On a
    # GPU the host would have to wait to know that, so there the largest p gives it, which is 1 / sum.
    # exp(-70) is 4e-31: neither it nor the p beside it is 0 in fp32, unless more than 1e7 classes share the sum.
    if not p.is_cuda and bool((below > -70).all()):
        return (below.exp() / p.gather(1, index).squeeze(1)).log_()
    return -p.amax(1).log_()


def triton_row_losses(labelled: Labelled, upstream: LossGradients, wanted: Extras):
    """As :func:`eager_row_losses`, by the kernels, on logits of any dtype that they take."""
    from ...kernels.cross_entropy.backward import cross_entropy_bwd
    from ...kernels.cross_entropy.forward import RowOutputs, forward_rows

    z = labelled.logits
    rows = labelled._replace(logits=z.unsqueeze(-1), loss=labelled.loss._replace(reduction="none"))

    def numbers(*shape):
        return z.new_empty(shape, dtype=torch.float32)

    n = len(z)
    out = RowOutputs(numbers(n), numbers(n), numbers(3, n), *(numbers(n) if want else None for want in wanted))
    at_once = upstream.loss is not None and upstream.lse is None and upstream.entropy is None
    forward_rows(rows, out, factor=upstream.loss, dx=rows.logits if at_once else None)
    if upstream.loss is not None and not at_once:
        statistics = RowStatistics(out.stats, entropy=out.entropy)
        cross_entropy_bwd(upstream, rows, statistics, (True, False), out=rows.logits)
    return out.loss, out.lse, out.hits, out.entropy


def extension_row_losses(labelled: Labelled, upstream: LossGradients, wanted: Extras):
    """As :func:`eager_row_losses`, by the extension, on CPU logits of any dtype."""
    into = (None if upstream.loss is None else labelled.logits, None)
    losses, lse, hits, entropy = native_row_losses(labelled, upstream, into, wanted)
    return losses, lse, hits if wanted.accuracy else None, entropy if wanted.entropy else None


ROW_LOSSES = {"eager": eager_row_losses, "triton": triton_row_losses, "native": extension_row_losses}
