"""Ordinary calls of linear_cross_entropy and linear_log_probs on a CPU, whose logits are one chunk.

All checks, the choice and the operators take 60 us and, between products, which leave little else in the caches, 110:
8 rows of 256 columns and 1000 classes in float32, forward and backward, take PyTorch 240 us on one core of an AMD EPYC.
What is ordinary has matrices of one dtype, class indices, and no option but ``ignore_index`` and ``reduction``.
:func:`fastllm.backends.pick` decides the same of such a call, and says why.
"""

from __future__ import annotations

import torch

from ...backends import NATIVE_DTYPES, free_for_native
from ..shared import onednn
from ..shared.autograd import PLAIN, apply_untransformed, unwrapped
from ..shared.widened import widens
from .at_once import linear_rows
from .call import Chunking
from .chunks import DEFAULT_WORKSPACE_MB, LayerLoss
from .linear_operator import LinearCrossEntropy
from .loss import Loss
from .native import REDUCTION_NUMBER

# What a chunk may take in any call on a CPU.
_WORKSPACE = int(DEFAULT_WORKSPACE_MB["cpu"] * 2**20)
_CHUNKING = Chunking(None, None, True, False)
_LEAST, _MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
_TOTAL = {"mean": 0.0, "sum": 1.0, "none": 1.0}


class _DeclinedError(Exception):
    """A target is no class, or many are ignored: the chunks' code serves, or names the target."""


def _computed(x, weight, target, loss: Loss, needs, *, keep: bool) -> list[torch.Tensor]:
    """[loss, lse, accuracy, entropy, logits, dx, dweight], without elements what was not asked for."""
    mean = None if loss.reduction == "none" else x.dtype
    served, *found = linear_rows(
        x, weight, target, None, None, None, None, loss.ignore_index, True, 0.0, 0.0, 1.0, 0.0,
        _TOTAL[loss.reduction], mean, keep, False, False, *needs,
    )  # fmt: skip
    if not served:
        raise _DeclinedError
    return found


class _OrdinaryLinearLoss(torch.autograd.Function):
    """The loss of x (N, D) and weight (V, D), which leaves to the backward what linear_operator.py's does.

    A mean or a sum leaves the gradients, row losses the logits.
    """

    @staticmethod
    def forward(ctx, x, weight, target, node: LayerLoss, dtype):
        keep = node.loss.reduction == "none"
        needs = (False, False) if keep else ctx.needs_input_grad[:2]
        value, _, _, _, logits, dx, dweight = _computed(x, weight, target, node.loss, needs, keep=keep)
        ctx.has_gradient, ctx.has_logits, ctx.has_entropy = not keep, keep, False
        ctx.dtype, ctx.call = dtype, node._replace(target=None)
        ctx.save_for_backward(x, weight, None, target, None, None, None, logits if keep else None, dx, dweight, None)
        return value if value.dtype is dtype else value.to(dtype)

    @staticmethod
    def backward(ctx, dloss):
        return *LinearCrossEntropy.backward(ctx, dloss, None, None, None)[:2], None, None, None


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
    """The loss of an ordinary call, for ``op`` "linear_log_probs" in at least fp32; None where it is not one.

    ``layer``: the pair of input and linear_weight.
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
    dtype = torch.float32 if op == "linear_log_probs" and x.dtype is not torch.float64 else x.dtype
    loss = Loss(ignore_index=ignore_index, reduction=reduction)
    x, weight, target = unwrapped((x, weight, target))
    try:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            # Under a frozen head row losses leave the gradient, and in float16 nothing is left.
            if x.dtype is torch.float16 or (reduction == "none" and not weight.requires_grad):
                return None
            node = LayerLoss(target, None, None, loss, _CHUNKING, "native", op)
            return apply_untransformed(_OrdinaryLinearLoss, x, weight, target, node, dtype)
        value = _computed(x, weight, target, loss, (False, False), keep=False)[0]
    except _DeclinedError:
        return None
    return value if value.dtype is dtype else value.to(dtype)
