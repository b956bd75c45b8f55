"""Residual add and layer norm in one pass: h = residual + dropout(input), y = layer_norm(h)."""

from __future__ import annotations

import torch

from ...backends import chosen_backend
from ...registry import Op, register
from .add_norm import DropsBranch
from .layer_norm import eager_layer_norm
from .operator import (
    add_norm_cost,
    added,
    check_norm,
    check_scalars,
    fused_norm,
    norm_reference,
    norm_samples,
    pick_norm,
    torch_is_faster,
)


def add_layer_norm_reference(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, weight_offset=0.0
):
    """The definition, in at least fp32, each output rounded once."""
    h = added(input, residual, dropout_p)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return norm_reference(wide, normalized_shape, weight, bias, eps, weight_offset, center=True).to(input.dtype), h


def add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, weight_offset=0.0
):
    """``h = residual + dropout(input)`` and ``layer_norm(h)``, fused: each tensor is moved once, either way.

    Args:
        input: a branch's output, (..., *normalized_shape), floating point, any strides.
        residual: the residual stream, of the input's shape; its dtype may be wider.
        normalized_shape, weight, bias, eps, weight_offset: as in :func:`fastllm.functional.layer_norm`.
        dropout_p: probability in [0, 1) that an element of ``input`` is dropped before the add, the others scaled by
            1 / (1 - dropout_p). As in torch's scaled_dot_product_attention the caller passes 0 when not training.
            Drawn from the device's default generator; backends draw different masks from the same seed.

    Returns:
        (y, h): y in the input's dtype, h in the residual's. y is the norm of h as rounded.

    Raises:
        TypeError: ``input`` or ``residual`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    shape = check_norm("add_layer_norm", input, normalized_shape, residual, weight=weight, bias=bias)
    check_scalars("add_layer_norm", weight_offset, dropout_p, eps)
    backend = pick_norm("add_layer_norm", shape, input, residual, weight, bias)
    torchs = chosen_backend() == "auto" and torch_is_faster(input, residual, weight, bias, weight_offset, dropout_p)
    if torchs or backend == "eager":
        h = added(input, residual, dropout_p)
        return eager_layer_norm(h, shape, weight, bias, eps, weight_offset).to(input.dtype), h
    return fused_norm(input, shape, weight, bias, eps, weight_offset, True, backend, residual, dropout_p)


class AddLayerNorm(DropsBranch, torch.nn.LayerNorm):
    """:func:`add_layer_norm` with torch.nn.LayerNorm's arguments and state_dict keys.

    ``forward(input, residual)`` gives (y, h); ``dropout_p`` acts in training mode only.
    """

    def forward(self, input, residual):
        return add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, dropout_p=self.active_dropout
        )


register(
    Op(
        name="add_layer_norm",
        summary="residual add, with dropout, then layer norm; both are returned",
        function=add_layer_norm,
        reference=add_layer_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=True, residual=True),
        cost=add_norm_cost,
        backends=("eager", "triton", "native"),
        module=AddLayerNorm,
        exception=lambda device: (
            "wider than 16 bits, and bfloat16 alone, without dropout: eager, which is faster"
            if device == "cpu"
            else None
        ),
    )
)
