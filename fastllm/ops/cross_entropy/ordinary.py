"""Ordinary calls of cross_entropy on a CPU, which are one call of the extension.

8 rows of 256 logits in float32, forward and backward, take 26 us on one core of an AMD EPYC so, PyTorch 20, and all
checks, the choice and the operators 130. What is ordinary has class indices, a row of logits each, and no option but
``ignore_index`` and ``reduction``.
:func:`fastllm.backends.pick` decides the same of such a call, and says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from ... import extension
from ...backends import NATIVE_DTYPES, free_for_native
from ..shared.autograd import PLAIN, unwatched
from .loss import Labelled, Loss, out_of_range
from .native import REDUCTION_NUMBER, native_scale_gradient
from .operator import LossGradients, LossNode, RowStatistics, loss_gradients

_NONE = REDUCTION_NUMBER["none"]
_DIRECT, _LOSS, _GRADIENT = extension.DIRECT, "cross_entropy_of_classes", "cross_entropy_of_classes_grad"
_LEAST, _MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def _refused(x, target, ignore_index) -> Exception:
    error = out_of_range(target, ignore_index, x.shape[1])
    return error or AssertionError("cross_entropy: the extension refused a class")


class _OrdinaryCrossEntropy(torch.autograd.Function):
    """The loss of logits (N, C), whose gradient the forward leaves, as that of operator.py does."""

    @staticmethod
    def forward(ctx, x, target, ignore_index, reduction):
        # As in cross_entropy.py.
        in_forward = reduction != _NONE and x.dtype is not torch.float16
        bad, value, dx = _DIRECT[_LOSS](x, target, ignore_index, reduction, in_forward)
        if bad >= 0:
            raise _refused(x, target, ignore_index)
        ctx.settings, ctx.has_gradient = (ignore_index, reduction), in_forward
        ctx.save_for_backward(x, target, dx)
        return value

    @staticmethod
    def backward(ctx, dvalue):
        x, target, dx = ctx.saved_tensors
        at_once = not torch.is_grad_enabled() and unwatched(dvalue) and not is_legacy_batchedtensor(dvalue)
        if ctx.has_gradient and at_once:
            # Handed out once, scaled in place: nobody else has seen it. A second backward takes the other way, to the
            # same bits.
            ctx.has_gradient = False
            dx = dx.data
            native_scale_gradient(dx, dvalue)
            return dx, None, None, None
        ignore_index, reduction = ctx.settings
        gradient = _gradient_once if at_once else _gradient_of_any_order
        return gradient(x, target, dvalue, ignore_index, reduction), None, None, None


def _gradient_once(x, target, dvalue, ignore_index, number) -> torch.Tensor:
    """By one call of the extension, to the bits of native.py's native_cross_entropy_bwd()."""
    if number == _NONE:
        dvalue = dvalue.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    # As the forward's own gradient, which is rounded before the upstream's factor: both ways agree bit for bit.
    scale_last = number != _NONE and x.dtype is not torch.float16
    dx = _DIRECT[_GRADIENT](x, target, None if scale_last else dvalue, ignore_index, number)
    if scale_last:
        native_scale_gradient(dx, dvalue)
    return dx


def _gradient_of_any_order(x, target, dvalue, ignore_index, number) -> torch.Tensor:
    (reduction,) = (name for name, other in REDUCTION_NUMBER.items() if other == number)
    loss = Loss(ignore_index=ignore_index, reduction=reduction)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = (target != ignore_index).sum().to(wide)
    statistics = RowStatistics(x.new_empty((3, 0), dtype=torch.float32), total)
    labelled, upstream = Labelled(x.unsqueeze(-1), target.unsqueeze(-1), None, loss), LossGradients(dvalue)
    node = LossNode(None, loss, x.dtype, with_gradient=False, inplace=False, backend="native")
    (found,) = loss_gradients(labelled, node, (True,), upstream, statistics)
    assert found is not None, "it was asked for"
    return found.squeeze(-1)


_dispatch_modes, _autocasts = torch._C._len_torch_dispatch_stack, torch.is_autocast_enabled
# Function.apply() without its binding of arguments, as apply_untransformed() finds it.
_apply: Any = super(torch.autograd.Function, _OrdinaryCrossEntropy).apply  # pyright: ignore[reportAttributeAccessIssue]


def ordinary_cross_entropy(x, target, ignore_index, reduction) -> torch.Tensor | None:
    """The loss of an ordinary call, or None where a call is not that. IndexError: a target is no class."""
    if type(x) not in PLAIN or type(target) not in PLAIN or not x.is_cpu or not target.is_cpu:
        return None
    if target.dtype is not torch.int64 or x.dtype not in NATIVE_DTYPES or target.layout is not torch.strided:
        return None
    number = REDUCTION_NUMBER.get(reduction) if type(reduction) is str else None
    if number is None or x.dim() != 2 or target.dim() != 1 or x.size(0) != target.numel():
        return None
    if type(ignore_index) is not int or not _LEAST <= ignore_index <= _MOST:
        return None
    if not free_for_native(x) or not x.is_contiguous() or _dispatch_modes() or _autocasts("cpu"):
        return None
    x, target = unwrap_if_dead(x), unwrap_if_dead(target)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply(x, target, ignore_index, number)
    bad, value, _ = _DIRECT[_LOSS](x, target, ignore_index, number, False)
    if bad >= 0:
        raise _refused(x, target, ignore_index)
    return value
