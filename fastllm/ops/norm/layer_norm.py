"""Layer norm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...registry import Op, register
from .operator import check_norm, check_scalars, fused_norm, norm_cost, norm_reference, norm_samples, pick_norm


def layer_norm_reference(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, weight_offset=0.0):
    """The definition, in at least fp32, rounded once to the input's dtype."""
    return norm_reference(input, normalized_shape, weight, bias, eps, weight_offset, center=True)


def eager_layer_norm(input, shape, weight, bias, eps, offset):
    """PyTorch's own operator wherever it takes these dtypes."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    if offset != 0.0 or (dtypes - {input.dtype} and (dtypes != {torch.float32} or input.device.type != "cpu")):
        return norm_reference(input, shape, weight, bias, eps, offset, center=True)
    return F.layer_norm(input, shape, weight, bias, eps)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, weight_offset=0.0):
    """``torch.nn.functional.layer_norm``, fused.

    Args:
        input: (..., *normalized_shape), floating point, any strides.
        normalized_shape: the last dimensions of ``input``, over which mean and variance are taken.
        weight, bias: normalized_shape, or None. May be fp32 beside a 16-bit input.
        eps: added to the variance.
        weight_offset: added to the weight in fp32, for weights stored as their distance from it.

    Returns:
        A tensor as ``input``, in its dtype. Mean and 1/std are taken in fp32 whatever the dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    if isinstance(input, torch.Tensor) and input.is_nested and weight_offset == 0.0:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    shape = check_norm("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    check_scalars("layer_norm", weight_offset, eps=eps)
    backend = pick_norm("layer_norm", shape, input, weight, bias)
    if backend == "eager":
        return eager_layer_norm(input, shape, weight, bias, eps, weight_offset)
    return fused_norm(input, shape, weight, bias, eps, weight_offset, True, backend)[0]


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
        backends=("eager", "triton"),
        module=LayerNorm,
    )
)
