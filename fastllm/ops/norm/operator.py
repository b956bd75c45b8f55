"""The norms' two registered operators, their gradient, and what picks between them and PyTorch's own operators."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...backends import under_transform
from ...registry import define
from ..shared.autograd import apply, frozen, gradients
from ..shared.dropout import dropout
from .call import NormBackward, NormCall, NormForward, NormOptions
from .native import norm_grad_rows, norm_rows
from .reference import branch_seed, norm_reference


def norm_refuses(backend: str, call: NormCall) -> str | None:
    """Why ``backend`` cannot take ``call``, or None."""
    if backend != "eager" and 0 in call.shape:
        return f"normalized_shape {list(call.shape)} has no elements"
    if backend == "triton":
        from ...kernels.sizes import NORM_COLUMNS

        columns = math.prod(call.shape)
        if columns > NORM_COLUMNS:
            return (
                f"the kernels take up to {NORM_COLUMNS:,} elements of normalized_shape, got {columns:,} in "
                f"{list(call.shape)}"
            )
    return None


def empty_is_torchs(call: NormCall) -> str | None:
    """Why PyTorch's operators serve ``call`` without being asked for: its rows have no elements. Else None."""
    return norm_refuses("any", call)


def layer_norm_prefers_torch(call: NormCall) -> str | None:
    """Why PyTorch's own layer norm, after an add where there is a residual, serves ``call`` without being asked for.

    Forward and backward on one core of an AMD EPYC, the time of PyTorch's operators over the extension's: in bfloat16
    1.34 to 1.70 (AVX-512) and 1.08 to 1.14 (AVX2) from 1024 x 768 to 8192 x 2304, and 0.6 for 8 rows, by the host's 25
    us; in float32 0.85 to 1.05 at 1024 x 768, and 1.46 where the result goes past the caches; in float64 0.7. An add
    before it brings 0.1 to 0.2, dropout a factor of 6 to 15. The number of rows may not decide: a row's bits would
    depend on the rows beside it.
    """
    reason = empty_is_torchs(call)
    wide = call.input.dtype.itemsize > 2
    if reason is not None or call.input.device.type != "cpu" or not wide or call.dropout_p > 0.0 or call.weight_offset:
        return reason
    normed = call.input.dtype if call.residual is None else call.residual.dtype
    if {p.dtype for p in (call.weight, call.bias) if p is not None} - {normed}:
        return None  # PyTorch's layer norm does not take them
    return "PyTorch's layer norm is as fast in more than 16 bits, unless something is dropped"


def _norm_fwd_fake(*args):
    call = NormForward(*args)
    x, residual = call.x, call.residual
    rows = x.numel() // x.shape[-1]
    wide = torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)
    wide = torch.promote_types(wide, x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(x.shape),
        x.new_empty(rows if call.center else 0, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


@define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float offset,"
    " float dropout_p, bool center, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_fwd_fake,
)
def _norm_fwd(*args):
    from ...kernels.norm.forward import norm_fwd

    return norm_fwd(NormForward(*args))


def _norm_bwd_fake(*args):
    return NormBackward(*args).new_gradients()


@define(
    "norm_bwd(Tensor dy, Tensor? dh, Tensor x, Tensor? weight, Tensor? seed, Tensor mean, Tensor rstd,"
    " ScalarType input_dtype, ScalarType bias_dtype, float offset, float dropout_p, bool center, bool[4] needs,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_bwd_fake,
)
def _norm_bwd(*args):
    from ...kernels.norm.backward import norm_bwd

    return norm_bwd(NormBackward(*args))


def forward_by(call: NormForward):
    """(y, h, mean, rstd). The extension's operator is called itself: within ``norm_fwd`` it takes 8 us more."""
    return norm_rows(call) if call.backend == "native" else _norm_fwd(*call)


def backward_by(call: NormBackward):
    """(dinput, dresidual, dweight, dbias), likewise."""
    return norm_grad_rows(call) if call.backend == "native" else _norm_bwd(*call)


class Normed(NamedTuple):
    """What a forward leaves for its gradient. ``rows`` were normed: x, or where one was ``added`` the sum."""

    rows: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    seed: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    added: bool
    input_dtype: torch.dtype
    options: NormOptions

    @property
    def bias_dtype(self) -> torch.dtype:
        return self.rows.dtype if self.bias is None else self.bias.dtype


def norm_gradients(found: Normed, needs, dy, dh):
    """The gradients of (x, residual, weight, bias) for those of y and h, None where there is none or no need."""
    if dy is None and dh is None:
        return None, None, None, None
    if dy is None:
        dy = torch.zeros_like(found.rows, dtype=found.input_dtype)
    dh = dh if found.added else None  # a compiled graph has zeros for the gradient of the empty h
    once = not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if once and (found.added or not under_transform()):
        return _gradients_once(found, needs, dy, dh)
    return _gradients_of_any_order(found, needs, dy, dh)


def _gradients_once(found: Normed, needs, dy, dh):
    """By one call of the backend, not themselves differentiable."""
    _, offset, dropout_p, center, backend = found.options
    dinput, dresidual, *others = backward_by(
        NormBackward(
            dy=dy, dh=dh, x=found.rows, weight=found.weight, seed=found.seed, mean=found.mean, rstd=found.rstd,
            input_dtype=found.input_dtype, bias_dtype=found.bias_dtype, offset=offset, dropout_p=dropout_p,
            center=center, needs=needs, backend=backend,
        )
    )  # fmt: skip
    if dropout_p == 0.0 and found.input_dtype == found.rows.dtype:
        dresidual = dinput
    grads = (dinput, dresidual, *others)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _gradients_of_any_order(found: Normed, needs, dy, dh):
    """Differentiable: the backend has the norm's own gradient, and PyTorch's operators the add's and the dropout's."""
    normed, weight, bias, seed, mean, rstd, added, input_dtype, options = found
    eps, offset, dropout_p, center, backend = options

    def launch(inputs, outputs_grad, extras, needs):
        (dy,), (x, weight, _), (mean, rstd) = outputs_grad, inputs, extras
        dy = dy.to(x.dtype)  # the gradient that is asked for is that of what was normed
        dx, _, *others = backward_by(
            NormBackward(
                dy=dy, dh=None, x=x, weight=weight, seed=None, mean=mean, rstd=rstd, input_dtype=x.dtype,
                bias_dtype=found.bias_dtype, offset=offset, dropout_p=0.0, center=center,
                needs=(needs[0], False, *needs[1:]), backend=backend,
            )
        )  # fmt: skip
        return dx, *others

    def formula(x, weight, bias):
        rows = NormCall(
            x, None, weight, bias, x.shape[-1:], eps=eps, weight_offset=offset, dropout_p=0.0, center=center
        )
        return norm_reference(rows).to(input_dtype)

    inner = (needs[0] or needs[1], *needs[2:])
    dx, dweight, dbias = gradients(launch, formula, (normed, weight, bias), inner, (dy,), (mean, rstd))
    if added and dh is not None and dx is not None:
        dx = dx + dh
    dinput = None
    if needs[0] and dx is not None:
        dinput = (dx if seed is None or dropout_p == 0.0 else dropout(dx, seed, dropout_p)).to(input_dtype)
    return dinput, dx if added and needs[1] else None, dweight, dbias


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, weight, bias, seed, options):
        return forward_by(NormForward(x, residual, weight, bias, seed, *options))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, seed, options = inputs
        _, h, mean, rstd = output
        ctx.added = residual is not None
        ctx.input_dtype = x.dtype
        ctx.options = options
        ctx.mark_non_differentiable(mean, rstd, *(frozen(h, (x, residual)) if ctx.added else (h,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h if ctx.added else x, weight, bias, seed, mean, rstd)

    @staticmethod
    def backward(ctx, dy, dh, _dmean, _drstd):
        rows, weight, bias, seed, mean, rstd = ctx.saved_tensors
        found = Normed(rows, weight, bias, seed, mean, rstd, ctx.added, ctx.input_dtype, ctx.options)
        return *norm_gradients(found, ctx.needs_input_grad[:4], dy, dh), None, None


def fused_norm(call: NormCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) by the kernels of ``backend``; h is empty without a residual."""
    x, residual, weight, bias, shape, eps, offset, dropout_p, center, _ = call
    seed = branch_seed(call) if dropout_p > 0.0 else None
    options = NormOptions(float(eps), float(offset), float(dropout_p), center, backend)
    if len(shape) > 1:
        rows = [None if t is None else t.flatten(-len(shape)) for t in (x, residual)]
        flat = [None if t is None else t.reshape(-1).contiguous() for t in (weight, bias)]
        y, h, _, _ = apply(_Norm, *rows, *flat, seed, options)
        return y.view(x.shape), h if residual is None else h.view(x.shape)
    weight, bias = (t if t is None or t.is_contiguous() else t.contiguous() for t in (weight, bias))
    y, h, _, _ = apply(_Norm, x, residual, weight, bias, seed, options)
    return y, h
