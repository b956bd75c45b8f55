"""Ordinary calls of the norms on a CPU: what serves them is known at once, where all checks and the choice take 7 us.

One row of 4096 in bfloat16, forward and backward, takes PyTorch 35 us on one core of an AMD EPYC. What is ordinary has
nothing dropped, nothing added to the weight, all tensors of one dtype, and rows of one dimension. :func:`pick` decides
the same of such a call, and says why.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import extension
from ...backends import KERNEL_DTYPES, forward_mode, free_for_native, free_for_torch, under_transform
from ..shared.autograd import PLAIN, apply_untransformed, frozen, unwrapped
from ..shared.widened import NARROW
from .call import NormOptions, WantedGradients
from .native import undropped_norm, undropped_norm_grad
from .operator import Normed, norm_gradients

# PyTorch's default of RMS norm, for the dtype that the mean of at most 32 bits is taken in.
_EPS = torch.finfo(torch.float32).eps
_DIRECT = extension.DIRECT


class _OrdinaryNorm(torch.autograd.Function):
    """y of rows of one dtype, and h where there is a residual, by the extension, where nothing transforms the call."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, options):
        y, h, mean, rstd = undropped_norm(x, residual, weight, bias, options.eps, options.center)
        ctx.settings = residual is not None, options
        if residual is None:
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            return y
        ctx.mark_non_differentiable(*frozen(h, (x, residual)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, bias, mean, rstd)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh=None):
        rows, weight, bias, mean, rstd = ctx.saved_tensors
        (added, options), needs, dtype = ctx.settings, ctx.needs_input_grad, rows.dtype
        if dy is None or torch.is_grad_enabled() or under_transform():
            found = Normed(rows, weight, bias, None, mean, rstd, added, dtype, options)
            return *norm_gradients(found, needs[:4], dy, dh), None
        # One gradient serves both inputs of the sum.
        wanted = WantedGradients(input=needs[0] or needs[1], residual=False, weight=needs[2], bias=needs[3])
        dx, _, dweight, dbias = undropped_norm_grad((dy, dh), rows, weight, (mean, rstd), options.center, wanted)
        return (
            dx if needs[0] else None, dx if needs[1] else None, dweight if needs[2] else None,
            dbias if needs[3] else None, None,
        )  # fmt: skip


def _fits(x, dtype: torch.dtype, shape) -> bool:
    return type(x) in PLAIN and x.dtype is dtype and x.shape == shape and x.is_cpu and x.layout is torch.strided


def _is_ordinary(x, shape, weight, bias, eps) -> bool:
    if type(x) not in PLAIN or type(shape) is not tuple or type(eps) is not float or x.shape[-1:] != shape:
        return False
    if not shape or not x.is_cpu or x.layout is not torch.strided or type(shape[0]) is not int:
        return False
    dtype = x.dtype
    if weight is None and bias is not None:
        return False  # for eager_norm(), which gives PyTorch's operator a weight
    return (weight is None or _fits(weight, dtype, shape)) and (bias is None or _fits(bias, dtype, shape))


def _by_extension(x, residual, weight, bias, eps, *, center: bool) -> Any:
    """y, with a residual (y, h), where the extension takes the call; else None."""
    if not free_for_native(x):
        return None
    differentiable = x.requires_grad or (residual is not None and residual.requires_grad)
    for parameter in (weight, bias):
        if parameter is not None:
            if not parameter.is_contiguous():
                return None
            differentiable = differentiable or parameter.requires_grad
    if differentiable and torch.is_grad_enabled():
        options = NormOptions(eps, 0.0, 0.0, center, "native")
        return apply_untransformed(_OrdinaryNorm, x, residual, weight, bias, options)
    x, residual, weight, bias = unwrapped((x, residual, weight, bias))
    if residual is None:
        return _DIRECT["normed_rows"](x, weight, bias, eps, center)
    return undropped_norm(x, residual, weight, bias, eps, center)[:2]


def ordinary_layer_norm(x, shape, weight, bias, eps) -> torch.Tensor | None:
    """Layer norm of an ordinary call, or None where a call is not that."""
    if not _is_ordinary(x, shape, weight, bias, eps):
        return None
    if x.dtype is torch.float32:
        return torch.layer_norm(x, shape, weight, bias, eps) if free_for_torch() and not forward_mode() else None
    return _by_extension(x, None, weight, bias, eps, center=True) if x.dtype in NARROW else None


def ordinary_add_layer_norm(input, residual, shape, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same of ``residual + input``: (y, h)."""
    if not _is_ordinary(input, shape, weight, bias, eps) or not _fits(residual, input.dtype, input.shape):
        return None
    if input.dtype is not torch.float32:
        return _by_extension(input, residual, weight, bias, eps, center=True) if input.dtype in NARROW else None
    if not free_for_torch() or forward_mode():
        return None
    h = residual + input
    return torch.layer_norm(h, shape, weight, bias, eps), h


def ordinary_rms_norm(x, shape, weight, eps) -> torch.Tensor | None:
    """RMS norm of an ordinary call, or None where a call is not that."""
    eps = _EPS if eps is None else eps
    if not _is_ordinary(x, shape, weight, None, eps) or x.dtype not in KERNEL_DTYPES:
        return None
    return _by_extension(x, None, weight, None, eps, center=False)


def ordinary_add_rms_norm(input, residual, shape, weight, eps) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same of ``residual + input``: (y, h)."""
    eps = _EPS if eps is None else eps
    if not _is_ordinary(input, shape, weight, None, eps) or input.dtype not in KERNEL_DTYPES:
        return None
    if not _fits(residual, input.dtype, input.shape):
        return None
    return _by_extension(input, residual, weight, None, eps, center=False)
