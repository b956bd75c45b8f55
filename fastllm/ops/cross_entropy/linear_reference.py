"""Behind linear_cross_entropy: checks, the definition, the plan, samples, least bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...registry import Cost, Sample
from ..shared.check import check_floating, check_integer
from .cross_entropy import cross_entropy_reference
from .loss import loss_dtype, transformed

DEFAULT_WORKSPACE_MB = {"cuda": 1200.0, "cpu": 64.0}


@dataclass(frozen=True)
class Plan:
    """How a call will run: ``rows`` of logits at a time in ``chunks`` turns, ``workspace_bytes`` beside the gradients.

    ``lane`` says what the gradients cost: "3 matmuls, no recompute" computes them with the loss; "4 matmuls, recompute"
    keeps nothing and computes the logits again in the backward; "1 matmul, loss only" where nothing needs a gradient.
    """

    rows: int
    chunks: int
    workspace_bytes: int
    lane: str

    def __str__(self):
        mib = self.workspace_bytes / 2**20
        return f"{self.chunks} chunks of {self.rows} rows, {mib:.1f} MiB of workspace, {self.lane}"


def check_whole(input, linear_weight, target, linear_bias, ignore_index, refused):
    """For class probabilities and weights of more than two dimensions; cross_entropy checks the rest.

    ``refused``: names of options that are for the other forms -> whether they were given.
    """
    op = "linear_cross_entropy"
    if not isinstance(input, torch.Tensor) or not input.is_floating_point() or not linear_weight.is_floating_point():
        raise TypeError(f"{op}: input and linear_weight must be floating-point tensors")
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{op}: input must be (N, D) or (D,) and linear_weight (V, ..., D) here, got {list(input.shape)} and "
            f"{list(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(f"{op}: a linear_weight of shape {list(linear_weight.shape)} needs an input (N, D)")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"{op}: linear_bias must be of shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}"
        )
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError(f"{op}: ignore_index is for class indices, got {ignore_index} with class probabilities")
    for name, given in refused.items():
        if given:
            raise ValueError(f"{op}: {name} is for class indices and a linear_weight (V, D)")


def check_linear(
    input, linear_weight, target, linear_bias, token_weight, shift, max_workspace_mb, max_targets, ignore_index
):
    op = "linear_cross_entropy"
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        check_floating(op, name, tensor)
    for name, tensor in (("linear_bias", linear_bias), ("token_weight", token_weight)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    check_integer(op, "ignore_index", ignore_index)
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        got = str(target.dtype) if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must hold class indices, int64 or uint8, got {got}")
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must be (classes, features), got shape {list(linear_weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"{op}: input must end in linear_weight's {linear_weight.shape[1]} features, got shape {list(input.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{op}: target must be of shape {list(input.shape[:-1])}, got {list(target.shape)}")
    if linear_bias is not None and tuple(linear_bias.shape) != (linear_weight.shape[0],):
        raise ValueError(
            f"{op}: linear_bias must be of shape [{linear_weight.shape[0]}], got {list(linear_bias.shape)}"
        )
    if token_weight is not None:
        if tuple(token_weight.shape) != tuple(target.shape):
            raise ValueError(
                f"{op}: token_weight must be of the target's shape {list(target.shape)}, got {list(token_weight.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(f"{op}: token_weight gets no gradient; multiply the losses of reduction='none' instead")
    others = dict(linear_weight=linear_weight, target=target, linear_bias=linear_bias, token_weight=token_weight)
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}; they must be together")
    if shift < 0 or (shift and target.dim() == 0):
        raise ValueError(f"{op}: shift must not be negative, and needs a dimension to shift along; got {shift}")
    if max_workspace_mb is not None and not max_workspace_mb > 0:
        raise ValueError(f"{op}: max_workspace_mb must be positive, got {max_workspace_mb}")
    if max_targets is not None and max_targets < 1:
        raise ValueError(f"{op}: max_targets must be positive, got {max_targets}")


def shifted(target, ignore_index: int, shift: int):
    """The target ``shift`` positions on; the last ones have none and are ignored."""
    if shift == 0:
        return target
    rest = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), ignore_index)
    return torch.cat((target[..., shift:], rest), -1)


def is_whole(linear_weight, target) -> bool:
    """Whether the call is of a form that is not computed in chunks."""
    tensors = isinstance(linear_weight, torch.Tensor) and isinstance(target, torch.Tensor)
    return tensors and (target.is_floating_point() or linear_weight.dim() > 2)


def whole_logits(input, linear_weight, linear_bias, dtype):
    """All the logits, (N, C, d1, ...) for a weight (C, d1, ..., D)."""
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(dtype)
    logits = F.linear(input.to(dtype), linear_weight.flatten(0, -2).to(dtype), bias)
    return logits.unflatten(-1, linear_weight.shape[:-1]) if linear_weight.dim() > 2 else logits


def reduced(rows, token_weight, y, weight, ignore_index: int, reduction: str):
    """(the loss of fp32 rows, what its mean divides by)."""
    if token_weight is not None:
        rows = rows * token_weight
    total = rows.new_ones(())
    if reduction == "mean":
        keep = y != ignore_index
        mass = keep.to(rows.dtype) if weight is None else weight.to(rows.dtype)[torch.where(keep, y, 0)] * keep
        total = (mass if token_weight is None else mass * token_weight).sum()
    return rows if reduction == "none" else rows.sum() / total, total


def linear_cross_entropy_reference(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, options=None, softcap=None, logit_scale=1.0, z_loss=0.0, token_weight=None, shift=0,
    max_workspace_mb=None, max_targets=None, recompute=False, return_lse=False, return_accuracy=False,
    return_entropy=False,
):  # fmt: skip
    """The definition, with all the logits, in at least fp32."""
    ignore_index = -100 if ignore_index is None else ignore_index
    if is_whole(linear_weight, target):
        logits = whole_logits(input, linear_weight, linear_bias, torch.promote_types(input.dtype, torch.float32))
        loss = cross_entropy_reference(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, return_lse=return_lse,
        )  # fmt: skip
        dtype = loss_dtype(input, target)
        return (loss[0].to(dtype), loss[1]) if return_lse else loss.to(dtype)
    wide = torch.promote_types(input.dtype, torch.float32)
    logits = input.to(wide).reshape(target.numel(), input.shape[-1]) @ linear_weight.to(wide).t()
    if linear_bias is not None:
        logits = logits + linear_bias.to(wide)
    y = shifted(target, ignore_index, shift).reshape(-1)
    rows, lse = cross_entropy_reference(
        logits, y, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing,
        softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, return_lse=True,
    )  # fmt: skip
    token_weight = None if token_weight is None else token_weight.reshape(-1).to(wide)
    loss, _ = reduced(rows, token_weight, y, weight, ignore_index, reduction)
    loss = loss.to(loss_dtype(input, target))
    outputs = [loss.view(target.shape) if reduction == "none" else loss]
    if return_lse:
        outputs.append(lse.view(target.shape))
    z = transformed(logits, softcap, logit_scale)
    if return_accuracy:
        keep = y != ignore_index
        own = z.gather(1, torch.where(keep, y, 0).unsqueeze(1)).squeeze(1)
        outputs.append((keep & (own >= z.amax(1))).to(wide).view(target.shape))
    if return_entropy:
        log_p = torch.log_softmax(z, 1)
        # p log p is 0 at p = 0.
        entropy = -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(1)
        outputs.append(entropy.view(target.shape))
    return tuple(outputs) if len(outputs) > 1 else loss.view(outputs[0].shape)


def keeps_wide(dtype: torch.dtype, backend: str) -> bool:
    """Whether a chunk's logits are held once more in fp32: the eager path does so for 16-bit inputs."""
    return backend == "eager" and torch.promote_types(dtype, torch.float32) != dtype


def plan(
    tokens: int, vocabulary: int, dtype, device_type: str, backend: str, max_workspace_mb, softcap, entropy: bool,
    lane: str,
) -> Plan:  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32).itemsize
    # Beside the logits, eager holds the soft cap's slope and what the entropy sums.
    more = keeps_wide(dtype, backend) + ((softcap is not None) + entropy if backend == "eager" else 0)
    row = vocabulary * (dtype.itemsize + more * wide)
    budget = (max_workspace_mb or DEFAULT_WORKSPACE_MB.get(device_type, 64.0)) * 2**20
    rows = max(1, min(int(budget // row), tokens))
    if 128 <= rows < tokens:
        rows -= rows % 128  # whole tiles of the matmuls
    chunks = math.ceil(tokens / rows) if tokens else 0
    rows = math.ceil(tokens / chunks) if chunks else rows  # all chunks alike, where that takes no more of them
    return Plan(rows, chunks, rows * row, lane)


def linear_samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def classes(n, *shape, ignored=0.25):
        y = torch.randint(0, n, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < ignored, -100, y)

    tiny = 1e-4  # MiB: a few rows at a time
    yield Sample("mean", (make(7, 16), make(50, 16, scale=0.3), classes(50, 7)))
    yield Sample(
        "bias_in_chunks", (make(9, 8), make(33, 8), classes(33, 9)), dict(linear_bias=make(33), max_workspace_mb=tiny)
    )
    yield Sample(
        "every_option",
        (make(2, 5, 8), make(21, 8), classes(21, 2, 5)),
        dict(
            linear_bias=make(21), weight=torch.rand(21, device=device).to(dtype), label_smoothing=0.1, softcap=4.0,
            logit_scale=0.7, z_loss=0.05, token_weight=torch.rand(2, 5, device=device), shift=1, return_lse=True,
            max_workspace_mb=tiny,
        ),
    )  # fmt: skip
    yield Sample(
        "accuracy_and_entropy",
        (make(7, 8), make(21, 8), classes(21, 7)),
        dict(return_accuracy=True, return_entropy=True, logit_scale=0.5, softcap=5.0, max_workspace_mb=tiny),
    )
    yield Sample("few_targets", (make(9, 8), make(21, 8), classes(21, 9, ignored=0.6)), dict(max_targets=8))
    yield Sample("none", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="none", max_workspace_mb=tiny))
    yield Sample("sum_recomputed", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="sum", recompute=True))
    yield Sample("frozen_body", (make(6, 8).detach(), make(21, 8), classes(21, 6)), dict(z_loss=0.1))
    yield Sample("frozen_head", (make(6, 8), make(21, 8).detach(), classes(21, 6)), dict(label_smoothing=0.2))
    yield Sample("no_rows", (make(0, 8), make(21, 8), classes(21, 0)), dict(reduction="sum"))
    yield Sample("strided", (make(8, 6).t(), make(8, 21).t(), classes(21, 6)), dict(reduction="sum"))
    yield Sample("all_ignored", (make(3, 8), make(21, 8), torch.full((3,), -100, device=device)))


def linear_cost(input, linear_weight, target, *, linear_bias=None, **options) -> Cost:
    """Input, weight and targets in; backward: their gradients out. Three matrix multiplications."""
    moved = sum(t.numel() * t.element_size() for t in (input, linear_weight, linear_bias) if t is not None)
    matmul = 2 * target.numel() * linear_weight.numel()
    wanted = sum(t.requires_grad for t in (input, linear_weight))
    return Cost(moved + 8 * target.numel(), moved, matmul, wanted * matmul)
