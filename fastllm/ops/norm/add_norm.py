"""Residual add and norm in one pass: h = residual + dropout(input), y = layer_norm(h) or rms_norm(h)."""

from __future__ import annotations

import torch

from ...backends import pick
from ...registry import Op, register
from ..shared.check import check_floating
from ..shared.stand_ins import any_stands_in, overridden
from .call import NormCall, check_branch_dropout, checked, default_eps
from .operator import empty_is_torchs, fused_norm, layer_norm_prefers_torch, norm_refuses
from .ordinary import ordinary_add_layer_norm, ordinary_add_rms_norm
from .reference import add_norm_reference, eager_add_norm
from .samples import add_layer_norm_examples, add_norm_cost, norm_samples


def add_layer_norm_call(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, weight_offset=0.0
) -> NormCall:
    """The arguments of :func:`add_layer_norm`, checked, as one value."""
    check_floating("add_layer_norm", "residual", residual, nested=True)
    call = NormCall(
        input, residual, weight, bias, normalized_shape, eps=eps, weight_offset=weight_offset, dropout_p=dropout_p,
        center=True,
    )  # fmt: skip
    return checked("add_layer_norm", call)


def add_rms_norm_call(
    input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, weight_offset=0.0
) -> NormCall:
    """The arguments of :func:`add_rms_norm`, checked, as one value."""
    check_floating("add_rms_norm", "residual", residual, nested=True)
    eps = default_eps(eps, residual.dtype)
    call = NormCall(
        input, residual, weight, None, normalized_shape, eps=eps, weight_offset=weight_offset, dropout_p=dropout_p,
        center=False,
    )  # fmt: skip
    return checked("add_rms_norm", call)


def add_layer_norm_reference(*args, **options):
    """The definition, in at least fp32, each output rounded once; takes add_layer_norm's arguments."""
    return add_norm_reference(add_layer_norm_call(*args, **options))


def add_rms_norm_reference(*args, **options):
    """The definition, in at least fp32, each output rounded once; takes add_rms_norm's arguments."""
    return add_norm_reference(add_rms_norm_call(*args, **options))


def _served(op: str, call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    backend = pick(op, call).backend
    return eager_add_norm(call) if backend == "eager" else fused_norm(call, backend)


def add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, weight_offset=0.0
):
    """``h = residual + dropout(input)`` and ``layer_norm(h)``, fused: each tensor is read or written once, forward and
    backward.

    Args:
        input: a branch's output, (..., *normalized_shape), floating point, any strides.
        residual: the residual stream, of the input's shape; its dtype may be wider.
        normalized_shape, weight, bias, eps, weight_offset: as in :func:`fastllm.functional.layer_norm`.
        dropout_p: probability in [0, 1) that an element of ``input`` is dropped before the add, the others scaled by
            1 / (1 - dropout_p). As in torch's scaled_dot_product_attention, the caller passes 0 when not training.
            The mask is fixed by a seed from the device's default generator, the row and the element: it is the same on
            every backend.

    Returns:
        (y, h): y in the input's dtype, h in the residual's. y is the norm of the rounded h.

    Raises:
        TypeError: ``input`` or ``residual`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    if type(dropout_p) is float and dropout_p == 0.0 and type(weight_offset) is float and weight_offset == 0.0:
        both = ordinary_add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
        if both is not None:
            return both
    options = dict(dropout_p=dropout_p, weight_offset=weight_offset)
    if any_stands_in(input, residual, weight, bias):
        return overridden(add_layer_norm, input, residual, normalized_shape, weight, bias, eps, **options)
    call = add_layer_norm_call(input, residual, normalized_shape, weight, bias, eps, **options)
    return _served("add_layer_norm", call)


def add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, weight_offset=0.0):
    """``h = residual + dropout(input)`` and ``rms_norm(h)``, fused: each tensor is read or written once, forward and
    backward.

    Args:
        input: a branch's output, (..., *normalized_shape), floating point, any strides.
        residual: the residual stream, of the input's shape; its dtype may be wider.
        normalized_shape, weight, eps, weight_offset: as in :func:`fastllm.functional.rms_norm`.
        dropout_p: probability in [0, 1) that an element of ``input`` is dropped before the add, the others scaled by
            1 / (1 - dropout_p). As in torch's scaled_dot_product_attention, the caller passes 0 when not training.
            The mask is fixed by a seed from the device's default generator, the row and the element: it is the same on
            every backend.

    Returns:
        (y, h): y in the input's dtype, h in the residual's. y is the norm of the rounded h.

    Raises:
        TypeError: ``input`` or ``residual`` is not a floating-point tensor.
        ValueError: a shape, device or option does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    if type(dropout_p) is float and dropout_p == 0.0 and type(weight_offset) is float and weight_offset == 0.0:
        both = ordinary_add_rms_norm(input, residual, normalized_shape, weight, eps)
        if both is not None:
            return both
    options = dict(dropout_p=dropout_p, weight_offset=weight_offset)
    if any_stands_in(input, residual, weight):
        return overridden(add_rms_norm, input, residual, normalized_shape, weight, eps, **options)
    call = add_rms_norm_call(input, residual, normalized_shape, weight, eps, **options)
    return _served("add_rms_norm", call)


class DropsBranch(torch.nn.Module):
    """Before one of torch's norm modules: dropout of the branch, in training mode only.

    ``first_row`` is set by :func:`fastllm.training.dropout.key_dropout`.
    """

    def __init__(self, *args, dropout_p: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        check_branch_dropout(type(self).__name__, dropout_p)
        self.dropout_p = dropout_p
        self.first_row: torch.Tensor | None = None

    @property
    def active_dropout(self) -> float:
        return self.dropout_p if self.training else 0.0

    def extra_repr(self):
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


class AddLayerNorm(DropsBranch, torch.nn.LayerNorm):
    """:func:`add_layer_norm` with torch.nn.LayerNorm's arguments and state_dict keys.

    ``forward(input, residual)`` gives (y, h); ``dropout_p`` acts in training mode only.
    """

    def forward(self, input, residual):
        dropout_p, operands = self.active_dropout, (self.normalized_shape, self.weight, self.bias, self.eps)
        if dropout_p == 0.0 or self.first_row is None:  # which counts for dropout alone
            return add_layer_norm(input, residual, *operands, dropout_p=dropout_p)
        call = add_layer_norm_call(input, residual, *operands, dropout_p=dropout_p)
        return _served("add_layer_norm", call._replace(first_row=self.first_row))


class AddRMSNorm(DropsBranch, torch.nn.RMSNorm):
    """:func:`add_rms_norm` with torch.nn.RMSNorm's arguments and state_dict keys.

    ``forward(input, residual)`` gives (y, h); ``dropout_p`` acts in training mode only.
    """

    def forward(self, input, residual):
        dropout_p, operands = self.active_dropout, (self.normalized_shape, self.weight, self.eps)
        if dropout_p == 0.0 or self.first_row is None:
            return add_rms_norm(input, residual, *operands, dropout_p=dropout_p)
        call = add_rms_norm_call(input, residual, *operands, dropout_p=dropout_p)
        return _served("add_rms_norm", call._replace(first_row=self.first_row))


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
        call=add_layer_norm_call,
        refuses=norm_refuses,
        prefers_torch=layer_norm_prefers_torch,
        examples=add_layer_norm_examples,
    )
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
        call=add_rms_norm_call,
        refuses=norm_refuses,
        prefers_torch=empty_is_torchs,
    )
)
