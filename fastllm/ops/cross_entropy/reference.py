"""cross_entropy's definition, and how PyTorch's own operators compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import under_transform
from ..shared.sharded import gather, log_softmax
from .call import CrossEntropyCall, cross_entropy_call
from .loss import Labelled, class_dim, loss_dtype


def cross_entropy_reference(*args, **options):
    """The definition, in at least fp32, rounded once to the loss's dtype; takes cross_entropy's arguments."""
    call = cross_entropy_call(*args, **options)
    loss, lse = loss_and_lse(Labelled(call.input, call.target, call.weight, call.loss))
    loss = loss.to(loss_dtype(call.input, call.target, call.weight))
    return (loss, lse) if call.return_lse else loss


def loss_and_lse(labelled: Labelled):
    """(loss, logsumexp) of logits (C,), (N, C) or (N, C, d1, ...), in at least fp32."""
    input, target, weight, loss = labelled
    dim = class_dim(input)
    z = loss.of_logits(input)
    n_classes = input.shape[dim]
    lse = torch.logsumexp(z, dim)
    log_p = log_softmax(z, dim)
    w = z.new_ones(n_classes) if weight is None else weight.to(z.dtype)
    w_along = w.view(-1, *[1] * (z.dim() - dim - 1))
    if target.is_floating_point():
        q = target.to(z.dtype)
        mass = (w_along * q).sum(dim)
        rows = -(w_along * q * log_p).sum(dim)
        count = max(input.numel() // max(n_classes, 1), 0)
        kept = None
    else:
        kept = target != loss.ignore_index
        index = torch.where(kept, target, 0).long()
        mass = torch.where(kept, _of_classes(w, index), 0.0)
        own = gather(log_p, dim, index.unsqueeze(dim).view(*index.shape[:dim], 1, *index.shape[dim:]))
        rows = -mass * own.view(index.shape)
        count = loss.divisor(mass.sum())
    smoothing = loss.label_smoothing
    if smoothing != 0.0:
        rows = (1 - smoothing) * rows - smoothing / n_classes * (w_along * log_p).sum(dim).view(rows.shape)
    if loss.has_penalty:
        rows = rows + loss.penalty(mass, lse.view(rows.shape))
    if kept is not None:
        rows = torch.where(kept, rows, 0.0)
    whole = rows if loss.reduction == "none" else rows.sum() if loss.reduction == "sum" else rows.sum() / count
    return whole, lse


def _of_classes(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``weight[index]`` where no transform or compiler stops: one of no dimensions would be read on the host."""
    return weight.index_select(0, index.reshape(-1)).view(index.shape)


def eager_cross_entropy(call: CrossEntropyCall):
    """By PyTorch's own operator, on logits that are scaled and soft-capped where the loss asks for it."""
    input, target, weight, loss, *_ = call
    out_dtype = loss_dtype(input, target, weight)
    if weight is not None and loss.label_smoothing != 0.0 and under_transform():
        # PyTorch's own selects the targets that count, of which vmap does not know how many there are.
        result, lse = loss_and_lse(Labelled(*call[:4]))
        return (result.to(out_dtype), lse) if call.return_lse else result.to(out_dtype)
    # In 16 bits PyTorch rounds each step. Maps are given to it in float32: see MAX_NARROW_MAP_CLASSES.
    widens = input.is_cpu and input.dim() > 2 and input.dtype in (torch.float16, torch.bfloat16)
    plain = loss.is_torchs and not widens and (weight is None or weight.dtype == input.dtype)
    z = input if plain else loss.of_logits(input)
    if weight is not None:
        weight = weight.to(z.dtype)
    result = F.cross_entropy(
        z, target, weight, ignore_index=loss.ignore_index,
        reduction="none" if loss.has_penalty else loss.reduction, label_smoothing=loss.label_smoothing,
    )  # fmt: skip
    if not loss.has_penalty and not call.return_lse:
        return result.to(out_dtype)
    dim = class_dim(input)
    lse = torch.logsumexp(z.to(torch.promote_types(z.dtype, torch.float32)), dim)
    if loss.has_penalty:
        if target.is_floating_point():
            q = target if weight is None else target * weight.view(-1, *[1] * (z.dim() - dim - 1))
            mass = q.to(lse.dtype).sum(dim)
            count = mass.numel()
        else:
            kept = target != loss.ignore_index
            index = torch.where(kept, target, 0)
            mass = kept.to(lse.dtype) if weight is None else torch.where(kept, _of_classes(weight, index), 0)
            count = loss.divisor(mass.sum())
        penalty = loss.penalty(mass, lse.view(mass.shape))
        if not target.is_floating_point():
            penalty = torch.where(kept, penalty, 0)
        result = result + penalty.view(result.shape)
        if loss.reduction != "none":
            result = result.sum() / count if loss.reduction == "mean" else result.sum()
    result = result.to(out_dtype)
    return (result, lse) if call.return_lse else result
