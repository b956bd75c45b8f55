"""Ordinary calls of linear_cross_entropy and linear_log_probs on a CPU, whose logits are one chunk.

All checks, the choice and the operators take 60 us and, between products, which leave little else in the caches, 110:
8 rows of 256 columns and 1000 classes in float32, forward and backward, take PyTorch 240 us on one core of an AMD EPYC.
What is ordinary has matrices of one dtype, class indices, and no option but ``ignore_index`` and ``reduction``.
:func:`fastllm.backends.pick` decides the same of such a call, and says why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C._functorch import is_legacy_batchedtensor

from ...backends import NATIVE_DTYPES, free_for_native
from ..shared import onednn
from ..shared.autograd import PLAIN, apply_untransformed, unwatched, unwrapped
from ..shared.widened import widens
from .at_once import linear_rows
from .call import Chunking
from .chunks import DEFAULT_WORKSPACE_MB, LayerLoss
from .linear_gradients import scale_all
from .linear_operator import LinearCrossEntropy, Saved
from .loss import Loss
from .native import REDUCTION_NUMBER

# What a chunk may take in any call on a CPU.
_WORKSPACE = int(DEFAULT_WORKSPACE_MB["cpu"] * 2**20)
_CHUNKING = Chunking(max_workspace_mb=None, max_targets=None, skip_ignored=True, for_entropy=False)
_LEAST, _MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
_TOTAL = {"mean": 0.0, "sum": 1.0, "none": 1.0}
_LOG_PROBS = "linear_log_probs"


class _DeclinedError(Exception):
    """A target is no class, or many are ignored: the chunks' code serves, or names the target."""


class _Settings(NamedTuple):
    """What an ordinary call asks for beside its tensors."""

    op: str
    ignore_index: int
    reduction: str

    @property
    def total(self) -> float:
        """What the extension divides by; below 0 it turns the sign of row losses, which are log-probabilities then."""
        return -1.0 if self.op == _LOG_PROBS else _TOTAL[self.reduction]

    def of(self, target: torch.Tensor) -> LayerLoss:
        """The same as the value that other calls are."""
        loss = Loss(ignore_index=self.ignore_index, reduction=self.reduction)
        return LayerLoss(target, None, None, loss, _CHUNKING, "native", self.op)


def _computed(x, weight, target, settings: _Settings, needs, *, keep: bool) -> list[torch.Tensor]:
    """[loss or log-probabilities, lse, accuracy, entropy, logits, dx, dweight], empty where not asked for."""
    mean = None if settings.reduction == "none" else x.dtype
    served, *found = linear_rows(
        x, weight, target, None, None, None, None, settings.ignore_index, True, 0.0, 0.0, 1.0, 0.0,
        settings.total, mean, keep, False, False, *needs,
    )  # fmt: skip
    if not served:
        raise _DeclinedError
    return found


class _OrdinaryLinearLoss(torch.autograd.Function):
    """The loss of x (N, D) and weight (V, D), which leaves to the backward what linear_operator.py's does.

    A mean or a sum leaves the gradients, row losses the logits.
    """

    @staticmethod
    def forward(ctx, x, weight, target, settings: _Settings, dtype):
        keep = settings.reduction == "none"
        needs = (False, False) if keep else ctx.needs_input_grad[:2]
        value, _, _, _, logits, dx, dweight = _computed(x, weight, target, settings, needs, keep=keep)
        ctx.has_gradient, ctx.has_logits, ctx.has_entropy = not keep, keep, False
        ctx.settings, ctx.dtype = settings, dtype
        ctx.save_for_backward(
            *Saved(
                x, weight, bias=None, target=target, class_weight=None, token_weight=None, total=None,
                logits=logits if keep else None, dx=dx, dweight=dweight, dbias=None,
            )
        )  # fmt: skip
        return value if value.dtype is dtype else value.to(dtype)

    @staticmethod
    def backward(ctx, dloss):
        # As linear_operator.py's, with less between products, where that takes 0.1 ms.
        at_once = not torch.is_grad_enabled() and unwatched(dloss) and not is_legacy_batchedtensor(dloss)
        saved = Saved(*ctx.saved_tensors)
        if at_once and ctx.has_logits:
            ctx.has_logits = False
            return *_gradients_of_rows(ctx, saved, dloss), None, None, None
        if at_once and ctx.has_gradient:
            ctx.has_gradient = False
            ready = zip((saved.dx, saved.dweight), ctx.needs_input_grad, strict=False)
            grads = [grad.data if need and grad is not None else None for grad, need in ready]
            scale_all(grads, dloss, "native")
            return *grads, None, None, None
        ctx.call = ctx.settings.of(saved.target).without_tensors()
        dloss = -dloss if ctx.settings.op == _LOG_PROBS else dloss
        return *LinearCrossEntropy.backward(ctx, dloss, None, None, None)[:2], None, None, None


def _gradients_of_rows(ctx, saved: Saved, upstream):
    """(gradient of x, of weight), None where not needed, over the logits that the forward left."""
    settings, wide = ctx.settings, torch.promote_types(saved.x.dtype, torch.float32)
    assert saved.logits is not None, "has_logits says so"
    need_x, need_weight = ctx.needs_input_grad[:2]
    *_, dx, dweight = linear_rows(
        saved.x, saved.weight, saved.target, saved.logits.data, upstream.to(wide).contiguous(), None, None,
        settings.ignore_index, True, 0.0, 0.0, 1.0, 0.0, settings.total, None, False, False, False, need_x, need_weight,
    )  # fmt: skip
    return dx if need_x else None, dweight if need_weight else None


def _is_matrix(x, dtype: torch.dtype) -> bool:
    return (
        type(x) in PLAIN and x.is_cpu and x.dtype is dtype and not x.is_nested and x.dim() == 2
        and x.layout is torch.strided
    )  # fmt: skip


def _fit(x, weight, target) -> bool:
    """Whether the tensors are those of an ordinary call that one chunk holds, with products as in products.py."""
    if x.dtype not in NATIVE_DTYPES or not _is_matrix(x, x.dtype):
        return False
    if not _is_matrix(weight, x.dtype) or type(target) not in PLAIN or not target.is_cpu or target.is_nested:
        return False
    if target.dtype is not torch.int64 or target.layout is not torch.strided or target.dim() != 1:
        return False
    (rows, depth), (classes, features) = x.shape, weight.shape
    if depth != features or target.numel() != rows or classes == 0 or rows * classes * x.itemsize > _WORKSPACE:
        return False
    return not widens(x) and not onednn.onednn_serves_rows(x, weight)


def ordinary_linear_loss(op: str, layer, target, ignore_index, reduction: str) -> torch.Tensor | None:
    """The loss of an ordinary call; None where the call is none.

    For ``op`` "linear_log_probs" it is the log-probability, which is the loss's negative, in at least fp32. ``layer``:
    the pair of input and linear_weight.
    """
    x, weight = layer
    # First: a compiler would keep what is asked of sizes.
    if type(x) not in PLAIN or not free_for_native(x):
        return None
    if type(ignore_index) is not int or not _LEAST <= ignore_index <= _MOST:
        return None
    if type(reduction) is not str or reduction not in REDUCTION_NUMBER or not _fit(x, weight, target):
        return None
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu"):
        return None
    dtype = torch.float32 if op == _LOG_PROBS and x.dtype is not torch.float64 else x.dtype
    settings = _Settings(op, ignore_index, reduction)
    x, weight, target = unwrapped((x, weight, target))
    try:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            # Under a frozen head row losses leave the gradient, and in float16 nothing is left.
            if x.dtype is torch.float16 or (reduction == "none" and not weight.requires_grad):
                return None
            return apply_untransformed(_OrdinaryLinearLoss, x, weight, target, settings, dtype)
        value = _computed(x, weight, target, settings, (False, False), keep=False)[0]
    except _DeclinedError:
        return None
    return value if value.dtype is dtype else value.to(dtype)
