"""Residual add and RMS norm in one pass: h = residual + dropout(input), y = rms_norm(h)."""

from __future__ import annotations

import torch

from ...registry import Op, register
from .add_norm import DropsBranch
from .operator import (
    add_norm_cost,
    added,
    check_norm,
    check_scalars,
    fused_norm,
    norm_reference,
    norm_samples,
    pick_norm,
)
from .rms_norm import default_eps, eager_rms_norm


def add_rms_norm_reference(
    input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, weight_offset=0.0
):
    """The definition, in at least fp32, each output rounded once."""
    h = added(input, residual, dropout_p)
    eps = default_eps(eps, h.dtype)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return norm_reference(wide, normalized_shape, weight, None, eps, weight_offset, center=False).to(input.dtype), h


def add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, weight_offset=0.0):
    """``h = residual + dropout(input)`` and ``rms_norm(h)``, fused: each tensor is moved once, either way.

    Args:
        input: a branch's output, (..., *normalized_shape), floating point, any strides.
        residual: the residual stream, of the input's shape; its dtype may be wider.
        normalized_shape, weight, eps, weight_offset: as in :func:`fastllm.functional.rms_norm`.
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
    shape = check_norm("add_rms_norm", input, normalized_shape, residual, weight=weight)
    check_scalars("add_rms_norm", weight_offset, dropout_p, eps)
    backend = pick_norm("add_rms_norm", shape, input, residual, weight)
    if backend == "eager":
        h = added(input, residual, dropout_p)
        return eager_rms_norm(h, shape, weight, eps, weight_offset).to(input.dtype), h
    return fused_norm(
        input, shape, weight, None, default_eps(eps, residual.dtype), weight_offset, False, backend, residual,
        dropout_p,
    )  # fmt: skip


class AddRMSNorm(DropsBranch, torch.nn.RMSNorm):
    """:func:`add_rms_norm` with torch.nn.RMSNorm's arguments and state_dict keys.

    ``forward(input, residual)`` gives (y, h); ``dropout_p`` acts in training mode only.
    """

    def forward(self, input, residual):
        return add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps, dropout_p=self.active_dropout
        )


register(
    Op(
        name="add_rms_norm",
        summary="residual add, with dropout, then RMS norm; both are returned",
        function=add_rms_norm,
        reference=add_rms_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=False, residual=True),
        cost=add_norm_cost,
        backends=("eager", "triton", "native"),
        module=AddRMSNorm,
    )
)
