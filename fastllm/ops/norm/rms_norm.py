"""RMS norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import pick
from ...registry import Op, register
from ..shared.check import check_floating
from ..shared.stand_ins import any_stands_in, overridden
from .call import NormCall, checked, default_eps
from .operator import empty_is_torchs, fused_norm, norm_refuses
from .ordinary import ordinary_rms_norm
from .reference import eager_norm, norm_reference
from .samples import norm_cost, norm_samples


def rms_norm_reference(*args, **options):
    """The definition, in at least fp32, rounded once to the input's dtype; takes rms_norm's arguments."""
    return norm_reference(rms_norm_call(*args, **options))


def rms_norm_call(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0) -> NormCall:
    """The arguments of :func:`rms_norm`, checked, as one value."""
    check_floating("rms_norm", "input", input, nested=True)
    eps = default_eps(eps, input.dtype)
    call = NormCall(
        input, None, weight, None, normalized_shape, eps=eps, weight_offset=weight_offset, dropout_p=0.0, center=False
    )
    return checked("rms_norm", call)


def rms_norm(input, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
    """``torch.nn.functional.rms_norm``, fused.

    Args:
        input: (..., *normalized_shape), floating point, any strides.
        normalized_shape: the last dimensions of ``input``, over which the mean square is taken.
        weight: normalized_shape, or None. May be fp32 with a 16-bit input.
        eps: added to the mean square; None means torch's default, the epsilon of the dtype that the mean is taken
            in (fp32's for 16-bit inputs).
        weight_offset: added to the weight in fp32; 1.0 for models that store weight - 1 (Gemma, arXiv:2403.08295).

    Returns:
        A tensor of the input's shape and dtype. The mean square is computed in fp32, whatever the dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    if isinstance(input, torch.Tensor) and input.is_nested and weight_offset == 0.0:
        return F.rms_norm(input, normalized_shape, weight, eps)
    if type(weight_offset) is float and weight_offset == 0.0:
        normed = ordinary_rms_norm(input, normalized_shape, weight, eps)
        if normed is not None:
            return normed
    if any_stands_in(input, weight):
        return overridden(rms_norm, input, normalized_shape, weight, eps, weight_offset=weight_offset)
    call = rms_norm_call(input, normalized_shape, weight, eps, weight_offset=weight_offset)
    backend = pick("rms_norm", call).backend
    return eager_norm(call) if backend == "eager" else fused_norm(call, backend)[0]


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm``, with the same arguments and state_dict keys, on :func:`rms_norm`."""

    def forward(self, x):
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


register(
    Op(
        name="rms_norm",
        summary="root mean square over the last dimensions, then weight",
        function=rms_norm,
        reference=rms_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=False),
        cost=norm_cost,
        backends=("eager", "triton", "native"),
        module=RMSNorm,
        call=rms_norm_call,
        refuses=norm_refuses,
        prefers_torch=empty_is_torchs,
    )
)
