"""What the norms pass around: a checked call, and the operands of the two registered operators."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..shared.check import check_floating, check_number


class NormCall(NamedTuple):
    """One call of a norm. The add norms have a ``residual``; ``center`` is layer norm, without it RMS norm.

    ``first_row``, one int64: how many entries of dimension 0 come before the input's, for the dropout mask.
    """

    input: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    shape: tuple[int, ...]
    eps: float
    weight_offset: float
    dropout_p: float
    center: bool
    first_row: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.input, self.residual, self.weight, self.bias

    def of(self, rows: torch.Tensor) -> NormCall:
        """The same norm of ``rows``, with nothing added to them."""
        return self._replace(input=rows, residual=None, dropout_p=0.0, first_row=None)


class NormOptions(NamedTuple):
    """What a norm's operators take besides tensors, in the order of the schema of ``norm_fwd``."""

    eps: float
    offset: float
    dropout_p: float
    center: bool
    backend: str


class NormForward(NamedTuple):
    """The operands of ``norm_fwd``, in the order of its schema.

    ``x`` (..., N) and ``residual`` of its shape are added, and the sum's rows are normed; without a residual x's are.
    ``weight`` and ``bias`` are (N,), contiguous. ``seed`` is two int64 on the device where ``dropout_p`` > 0, a key and
    the number of the first row: the dropout of ``x`` before the add. ``offset`` is added to the weight.
    """

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    seed: torch.Tensor | None
    eps: float
    offset: float
    dropout_p: float
    center: bool
    backend: str


class WantedGradients(NamedTuple):
    """Which gradients a backward must fill. ``input`` stands for both inputs where their gradients are the same."""

    input: bool
    residual: bool
    weight: bool
    bias: bool


class NormBackward(NamedTuple):
    """The operands of ``norm_bwd``, in the order of its schema.

    ``dy`` is the gradient of y, and ``dh`` that of h or None. ``x`` is what was normed: the input, or h. ``mean`` and
    ``rstd`` are the forward's. ``needs`` says of (input, residual, weight, bias) which gradients are wanted.
    """

    dy: torch.Tensor
    dh: torch.Tensor | None
    x: torch.Tensor
    weight: torch.Tensor | None
    seed: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    input_dtype: torch.dtype
    bias_dtype: torch.dtype
    offset: float
    dropout_p: float
    center: bool
    needs: tuple[bool, bool, bool, bool]
    backend: str

    def wanted(self) -> WantedGradients:
        """``needs``, where one gradient serves both inputs if there is no dropout and they have one dtype."""
        input, residual, weight, bias = self.needs
        if self.dropout_p == 0.0 and self.input_dtype == self.x.dtype:
            return WantedGradients(input or residual, residual=False, weight=weight, bias=bias)
        return WantedGradients(input, residual, weight, bias)

    def weight_grad_dtype(self) -> torch.dtype:
        """The weight's dtype; x's where no gradient of a weight is wanted."""
        return self.x.dtype if self.weight is None or not self.needs[2] else self.weight.dtype

    def new_gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dinput, dresidual, dweight, dbias), uninitialised; one that is not wanted is empty."""
        x, wanted, n_cols = self.x, self.wanted(), self.x.shape[-1]
        return (
            x.new_empty(x.shape if wanted.input else 0, dtype=self.input_dtype),
            x.new_empty(x.shape if wanted.residual else 0),
            x.new_empty(n_cols if wanted.weight else 0, dtype=self.weight_grad_dtype()),
            x.new_empty(n_cols if wanted.bias else 0, dtype=self.bias_dtype),
        )


def _not_dimensions(op: str, normalized_shape) -> TypeError:
    return TypeError(f"{op}: normalized_shape must be an integer or a sequence of them, got {normalized_shape!r}")


def _dimensions(op: str, normalized_shape) -> tuple[int, ...]:
    if type(normalized_shape) is tuple and len(normalized_shape) == 1 and type(normalized_shape[0]) is int:
        return normalized_shape  # most of them, in a tenth of the time
    try:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    except TypeError:
        raise _not_dimensions(op, normalized_shape) from None
    # The types that are wrong: NumPy's integers and symbolic integers are right, but are not of type int.
    if isinstance(normalized_shape, str) or any(
        isinstance(n, float | str | bool | torch.Tensor | type(None)) for n in shape
    ):
        raise _not_dimensions(op, normalized_shape)
    if not shape:
        raise ValueError(f"{op}: normalized_shape must name at least one dimension, got ()")
    return shape


def _check_together(op: str, name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}; they must be together")


def default_eps(eps: float | None, dtype: torch.dtype) -> float:
    """``eps``, or torch's default: the epsilon of the dtype that the mean is taken in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


def check_norm_options(op: str, call: NormCall) -> None:
    """Raises TypeError or ValueError where eps, weight_offset or dropout_p is not what it may be."""
    check_number(op, "eps", call.eps)
    check_number(op, "weight_offset", call.weight_offset)
    if not -math.inf < call.weight_offset < math.inf:
        raise ValueError(f"{op}: weight_offset must be finite, got {call.weight_offset}")
    check_branch_dropout(op, call.dropout_p)


def check_branch_dropout(op: str, dropout_p: float) -> None:
    check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def checked(op: str, call: NormCall) -> NormCall:
    """``call`` with its shape as a tuple, once everything in it fits.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, device or option does not fit.
    """
    input, residual, weight, bias, shape = call[:5]
    check_floating(op, "input", input, nested=True)
    if residual is not None:
        check_floating(op, "residual", residual, nested=True)
    shape = _dimensions(op, shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: input must end in normalized_shape {list(shape)}, got input of shape {list(input.shape)}"
        )
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(
                f"{op}: residual must have the input's shape {list(input.shape)}, got {list(residual.shape)}"
            )
        _check_together(op, "residual", residual, input)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        check_floating(op, name, parameter)
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have normalized_shape {list(shape)}, got shape {list(parameter.shape)}"
            )
        _check_together(op, name, parameter, input)
    check_norm_options(op, call)
    # The torch.compile of torch 2.11 does not compare tuples by "is".
    if type(call.shape) is tuple and shape == call.shape and type(call.weight_offset) is float:
        return call
    return call._replace(shape=shape, weight_offset=float(call.weight_offset))
