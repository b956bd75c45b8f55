"""Layer norm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import pick
from ...registry import Op, register
from ..shared.stand_ins import any_stands_in, overridden
from .call import NormCall, checked
from .operator import fused_norm, layer_norm_prefers_torch, norm_refuses
from .ordinary import ordinary_layer_norm
from .reference import eager_norm, norm_reference
from .samples import layer_norm_examples, norm_cost, norm_samples


def layer_norm_reference(*args, **options):
    """The definition, in at least fp32, rounded once to the input's dtype; takes layer_norm's arguments."""
    return norm_reference(layer_norm_call(*args, **options))


def layer_norm_call(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, weight_offset=0.0) -> NormCall:
    """The arguments of :func:`layer_norm`, checked, as one value."""
    call = NormCall(
        input, None, weight, bias, normalized_shape, eps=eps, weight_offset=weight_offset, dropout_p=0.0, center=True
    )
    return checked("layer_norm", call)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, weight_offset=0.0):
    """``torch.nn.functional.layer_norm``, fused.

    Args:
        input: (..., *normalized_shape), floating point, any strides.
        normalized_shape: the last dimensions of ``input``, over which mean and variance are taken.
        weight, bias: normalized_shape, or None. May be fp32 with a 16-bit input.
        eps: added to the variance.
        weight_offset: added to the weight in fp32, for models that store the weight minus this offset.

    Returns:
        A tensor of the input's shape and dtype. Mean and 1/std are computed in fp32, whatever the dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    if isinstance(input, torch.Tensor) and input.is_nested and weight_offset == 0.0:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if type(weight_offset) is float and weight_offset == 0.0:
        normed = ordinary_layer_norm(input, normalized_shape, weight, bias, eps)
        if normed is not None:
            return normed
    if any_stands_in(input, weight, bias):
        return overridden(layer_norm, input, normalized_shape, weight, bias, eps, weight_offset=weight_offset)
    call = layer_norm_call(input, normalized_shape, weight, bias, eps, weight_offset=weight_offset)
    backend = pick("layer_norm", call).backend
    return eager_norm(call) if backend == "eager" else fused_norm(call, backend)[0]


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm``, with the same arguments and state_dict keys, on :func:`layer_norm`."""

    def forward(self, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


register(
    Op(
        name="layer_norm",
        summary="mean and variance over the last dimensions, then weight and bias",
        function=layer_norm,
        reference=layer_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=True),
        cost=norm_cost,
        backends=("eager", "triton", "native"),
        module=LayerNorm,
        call=layer_norm_call,
        refuses=norm_refuses,
        prefers_torch=layer_norm_prefers_torch,
        examples=layer_norm_examples,
    )
)
