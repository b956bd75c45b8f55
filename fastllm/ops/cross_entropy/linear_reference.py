"""linear_cross_entropy's definition, with all the logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..shared.sharded import gather, log_softmax
from .call import LinearCrossEntropyCall, is_whole, linear_cross_entropy_call
from .loss import Labelled, Loss, loss_dtype
from .reference import cross_entropy_reference, loss_and_lse


def shifted(target, blank: int, shift: int):
    """What stands ``shift`` positions further on; ``blank`` at the last positions, which have nothing there."""
    if shift == 0:
        return target
    rest = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), blank)
    return torch.cat((target[..., shift:], rest), -1)


def whole_logits(input, linear_weight, linear_bias, dtype):
    """All the logits, (N, C, d1, ...) for a weight (C, d1, ..., D)."""
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(dtype)
    logits = F.linear(input.to(dtype), linear_weight.flatten(0, -2).to(dtype), bias)
    return logits.unflatten(-1, linear_weight.shape[:-1]) if linear_weight.dim() > 2 else logits


def denominator(rows, target, weight, token_weight, loss: Loss):
    """What a mean of ``rows`` divides by, 1 for the other reductions: class weights times token weights."""
    if loss.reduction != "mean":
        return rows.new_ones(())
    keep = target != loss.ignore_index
    mass = keep.to(rows.dtype) if weight is None else weight.to(rows.dtype)[torch.where(keep, target, 0)] * keep
    return loss.divisor((mass if token_weight is None else mass * token_weight).sum())


def linear_cross_entropy_reference(input, linear_weight, target, **options):
    """The definition, with all the logits, in at least fp32; takes linear_cross_entropy's arguments."""
    if is_whole(linear_weight, target):
        return _whole_reference(input, linear_weight, target, **options)
    call = linear_cross_entropy_call(input, linear_weight, target, **options)
    loss, lse, accuracy, entropy = linear_definition(call)
    asked = ((call.return_lse, lse), (call.return_accuracy, accuracy), (call.return_entropy, entropy))
    outputs = [loss.to(loss_dtype(input, target)), *(values for want, values in asked if want)]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _whole_reference(
    input, linear_weight, target, *, linear_bias=None, ignore_index=None, options=None, token_weight=None, shift=0,
    max_workspace_mb=None, max_targets=None, recompute=False, return_accuracy=False, return_entropy=False, **more,
):  # fmt: skip
    """For torch's other forms: options for class indices alone are ignored here, and refused by the op."""
    logits = whole_logits(input, linear_weight, linear_bias, torch.promote_types(input.dtype, torch.float32))
    ignore_index = -100 if ignore_index is None else ignore_index
    loss = cross_entropy_reference(logits, target, ignore_index=ignore_index, **more)
    dtype = loss_dtype(input, target)
    return (loss[0].to(dtype), loss[1]) if isinstance(loss, tuple) else loss.to(dtype)


def linear_definition(call: LinearCrossEntropyCall):
    """(loss, lse, accuracy, entropy), in at least fp32; the rows' ones of the target's shape."""
    input, linear_weight, target, loss = call.input, call.linear_weight, call.target, call.loss
    wide = torch.promote_types(input.dtype, torch.float32)
    logits = input.to(wide).reshape(target.numel(), input.shape[-1]) @ linear_weight.to(wide).t()
    if call.linear_bias is not None:
        logits = logits + call.linear_bias.to(wide)
    y = shifted(target, loss.ignore_index, call.shift).reshape(-1)
    rows, lse = loss_and_lse(Labelled(logits, y, call.weight, loss._replace(reduction="none")))
    token_weight = None if call.token_weight is None else call.token_weight.reshape(-1).to(wide)
    if token_weight is not None:
        rows = rows * token_weight
    total = denominator(rows, y, call.weight, token_weight, loss)
    whole = rows.view(target.shape) if loss.reduction == "none" else rows.sum() / total
    accuracy = entropy = None
    if call.return_accuracy:
        z = loss.of_logits(logits)
        keep = y != loss.ignore_index
        own = gather(z, 1, torch.where(keep, y, 0).unsqueeze(1).long()).squeeze(1)
        accuracy = (keep & (own >= z.amax(1))).to(wide).view(target.shape)
    if call.return_entropy:
        log_p = log_softmax(loss.of_logits(logits), 1)
        # p log p is 0 at p = 0.
        entropy = -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(1).view(target.shape)
    return whole, lse.view(target.shape), accuracy, entropy
