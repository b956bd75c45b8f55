"""What the norms share: checks, the two registered operators and their gradient, samples, least bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...backends import chosen_backend, pick_by_tensors
from ...registry import Cost, Sample, define
from ..shared.autograd import apply, gradients
from ..shared.check import check_floating
from ..shared.philox import draw_seed, dropout_mask, rows_kept


def _shape(op: str, normalized_shape) -> tuple[int, ...]:
    try:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    except TypeError:
        shape = (None,)
    # Not a list of what may stand there: numpy's integers and symbolic ones are no ints.
    if isinstance(normalized_shape, str) or any(
        isinstance(n, float | str | bool | torch.Tensor | type(None)) for n in shape
    ):
        raise TypeError(f"{op}: normalized_shape must be an integer or a sequence of them, got {normalized_shape!r}")
    return shape


def check_norm(op: str, input, normalized_shape, *residuals, **parameters) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, once ``input`` and the other tensors are found to fit it."""
    for name, tensor in zip(("input", "residual"), (input, *residuals), strict=False):
        check_floating(op, name, tensor)
    shape = _shape(op, normalized_shape)
    if not shape:
        raise ValueError(f"{op}: normalized_shape must name at least one dimension, got ()")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: input must end in normalized_shape {list(shape)}, got input of shape {list(input.shape)}"
        )
    for residual in residuals:
        if residual.shape != input.shape:
            raise ValueError(
                f"{op}: residual must have the input's shape {list(input.shape)}, got {list(residual.shape)}"
            )
        if residual.device != input.device:
            raise ValueError(f"{op}: residual is on {residual.device}, input on {input.device}; they must be together")
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_floating(op, name, parameter)
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have normalized_shape {list(shape)}, got shape {list(parameter.shape)}"
            )
        if parameter.device != input.device:
            raise ValueError(f"{op}: {name} is on {parameter.device}, input on {input.device}; they must be together")
    return shape


def check_scalars(op: str, weight_offset: float, dropout_p: float = 0.0, eps: float | None = None) -> None:
    if isinstance(eps, str | list | tuple):
        raise TypeError(f"{op}: eps must be a number, got {eps!r}")
    if not -math.inf < weight_offset < math.inf:
        raise ValueError(f"{op}: weight_offset must be finite, got {weight_offset}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def torch_is_faster(input: torch.Tensor, residual: torch.Tensor, weight, bias, offset: float, dropout_p: float) -> bool:
    """Whether an add and PyTorch's own layer norm beat the extension on a CPU.

    In fp32 they take half its time. In bf16, forward and backward on one core of an AMD EPYC, 0.75 of it at 512 x 4096
    and 0.8 at 1024 x 768, where each is one call: one dtype, no dropout.
    """
    if input.device.type != "cpu" or input.dtype == torch.float16:
        return False
    if input.dtype.itemsize > 2:
        return True
    dtypes = {t.dtype for t in (weight, bias) if t is not None}
    plain = not dtypes - {input.dtype} or dtypes == {torch.float32}
    return input.dtype == residual.dtype and plain and offset == 0.0 and dropout_p == 0.0


def pick_norm(op: str, shape: tuple[int, ...], *tensors: torch.Tensor | None) -> str:
    """The backend that serves this call."""
    empty = 0 in shape
    if chosen_backend() == "auto" and empty:
        return "eager"
    refuses = f"normalized_shape {list(shape)} has no elements" if empty else None
    return pick_by_tensors(op, *tensors, refused={"triton": refuses, "native": refuses})


def _fwd_fake(x, residual, weight, bias, seed, eps, offset, p, center, backend):
    rows = x.numel() // x.shape[-1]
    wide = torch.promote_types(x.dtype if residual is None else residual.dtype, torch.float32)
    wide = torch.promote_types(wide, x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(x.shape),
        x.new_empty(rows if center else 0, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


@define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float offset, float p,"
    " bool center, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _norm_fwd(*args):
    *args, backend = args
    if backend == "native":
        from .native import norm_fwd
    else:
        from ...kernels.norm.forward import norm_fwd

    return norm_fwd(*args)


def _bwd_fake(dy, dh, x, weight, seed, mean, rstd, input_dtype, bias_dtype, offset, p, center, needs, backend):
    n = x.shape[-1]
    need_dinput, need_dresidual, need_dweight, need_dbias = needs
    if p == 0.0 and input_dtype == x.dtype:
        need_dinput, need_dresidual = need_dinput or need_dresidual, False
    return (
        x.new_empty(x.shape if need_dinput else 0, dtype=input_dtype),
        x.new_empty(x.shape if need_dresidual else 0),
        x.new_empty(n if need_dweight else 0, dtype=weight.dtype if need_dweight else x.dtype),
        x.new_empty(n if need_dbias else 0, dtype=bias_dtype),
    )


@define(
    "norm_bwd(Tensor dy, Tensor? dh, Tensor x, Tensor? weight, Tensor? seed, Tensor mean, Tensor rstd,"
    " ScalarType input_dtype, ScalarType bias_dtype, float offset, float p, bool center, bool[4] needs,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _norm_bwd(*args):
    *args, backend = args
    if backend == "native":
        from .native import norm_bwd
    else:
        from ...kernels.norm.backward import norm_bwd

    return norm_bwd(*args)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, weight, bias, seed, eps, offset, p, center, backend):
        return _norm_fwd(x, residual, weight, bias, seed, eps, offset, p, center, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, seed, *ctx.options = inputs
        _, h, mean, rstd = output
        ctx.added = residual is not None
        ctx.input_dtype = x.dtype
        ctx.mark_non_differentiable(mean, rstd, *(() if ctx.added else (h,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h if ctx.added else x, weight, bias, seed, mean, rstd)

    @staticmethod
    def backward(ctx, dy, dh, _dmean, _drstd):
        none = (None,) * (1 + len(ctx.options))
        if dy is None and dh is None:
            return None, None, None, None, *none
        normed, weight, bias, seed, mean, rstd = ctx.saved_tensors
        eps, offset, p, center, backend = ctx.options
        bias_dtype = normed.dtype if bias is None else bias.dtype
        needs = ctx.needs_input_grad[:4]
        if dy is None:
            dy = torch.zeros_like(normed, dtype=ctx.input_dtype)
        if ctx.added and (not torch.is_grad_enabled() or torch.compiler.is_compiling()):
            dinput, dresidual, *others = _norm_bwd(
                dy, dh, normed, weight, seed, mean, rstd, ctx.input_dtype, bias_dtype, offset, p, center, needs,
                backend,
            )  # fmt: skip
            if p == 0.0 and ctx.input_dtype == normed.dtype:
                dresidual = dinput
            grads = (dinput, dresidual, *others)
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *none

        def launch(inputs, outputs_grad, extras, needs):
            x, weight, _ = inputs
            dx, _, *others = _norm_bwd(
                *outputs_grad, None, x, weight, None, *extras, x.dtype, bias_dtype, offset, 0.0, center,
                (needs[0], False, *needs[1:]), backend,
            )  # fmt: skip
            return dx, *others

        def formula(x, weight, bias):
            return norm_reference(x, x.shape[-1:], weight, bias, eps, offset, center).to(ctx.input_dtype)

        inner = (needs[0] or needs[1], *needs[2:])
        dx, dweight, dbias = gradients(launch, formula, (normed, weight, bias), inner, (dy,), (mean, rstd))
        if ctx.added and dh is not None and dx is not None:
            dx = dx + dh
        dinput = dx if needs[0] else None
        if needs[0] and p > 0.0:
            native = backend == "native"
            kept = dropout_mask(seed, dx.shape, p) if native else rows_kept(seed, rstd.numel(), dx.shape[-1], p)
            dinput = torch.where(kept.view(dx.shape), dx * (1.0 / (1.0 - p)), 0.0)
        dinput = dinput.to(ctx.input_dtype) if needs[0] else None
        return dinput, dx if ctx.added and needs[1] else None, dweight, dbias, *none


def fused_norm(input, shape, weight, bias, eps, offset, center: bool, backend: str, residual=None, p: float = 0.0):
    """(y, h) by ``backend``'s kernels; h is None without a residual."""

    def flat(parameter):
        return None if parameter is None else parameter.reshape(-1).contiguous()

    def rows(tensor):
        return None if tensor is None else tensor.flatten(-len(shape))

    seed = draw_seed(input.device) if p > 0.0 else None
    y, h, _, _ = apply(
        _Norm, rows(input), rows(residual), flat(weight), flat(bias), seed, float(eps), float(offset), float(p), center,
        backend,
    )  # fmt: skip
    return y.view(input.shape), None if residual is None else h.view(input.shape)


def norm_reference(input, normalized_shape, weight, bias, eps, offset, center: bool):
    """The definition of both norms, in at least fp32, rounded once to the input's dtype."""
    wide = torch.promote_types(input.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(wide)
    if center:
        x = x - x.mean(dims, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide) + offset)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(input.dtype)


def added(input, residual, dropout_p: float):
    """residual + dropout(input), in at least fp32, rounded once to the residual's dtype."""
    if dropout_p == 0.0 and input.dtype == residual.dtype:
        return residual + input  # PyTorch's own add of 16-bit numbers is in fp32, rounded once
    wide = torch.promote_types(torch.promote_types(input.dtype, residual.dtype), torch.float32)
    branch = input.to(wide) if dropout_p == 0.0 else F.dropout(input.to(wide), dropout_p)
    return (residual.to(wide) + branch).to(residual.dtype)


def norm_samples(device, dtype, *, bias: bool, residual: bool = False):
    """Shapes and layouts that have broken norms elsewhere; floating leaves require grad."""

    def make(*shape, scale=1.0, offset=0.0, dtype=dtype):
        values = torch.randn(shape, device=device, dtype=torch.float32) * scale + offset
        return values.to(dtype).requires_grad_()

    def sample(name, x, shape: Sequence[int], weight=True, use_bias=bias, other=None, **kwargs):
        if weight:
            kwargs["weight"] = make(*shape, scale=0.3, offset=1.0)
        if use_bias:
            kwargs["bias"] = make(*shape)
        args = (x, other if other is not None else make(*x.shape)) if residual else (x,)
        return Sample(name, (*args, tuple(shape)), kwargs)

    # With one column 1/std is 1/sqrt(eps), and eager PyTorch's folded constants cancel that badly at the usual eps.
    yield sample("3x1", make(3, 1), (1,), eps=1e-2)
    for rows, cols in ((1, 9), (5, 63), (2, 100), (37, 127), (300, 8), (2, 1000), (1, 8200)):
        yield sample(f"{rows}x{cols}", make(rows, cols), (cols,))
    yield sample("no_rows", make(0, 16), (16,))
    yield sample("vector", make(33), (33,))
    yield sample("no_parameters", make(2, 3, 24), (24,), weight=False, use_bias=False)
    yield sample("two_dims", make(4, 3, 5, 6), (5, 6))
    yield sample("large_mean", make(4, 96, scale=0.5, offset=8.0), (96,))
    yield sample("transposed", make(40, 6).transpose(0, 1), (40,))
    yield sample("row_stride", make(6, 64)[:, 5:38], (33,))
    yield sample("packed_heads", make(5, 3, 4, 16)[:, 1], (16,))
    yield sample("expanded", make(1, 48).expand(5, 48), (48,))
    yield sample("eps", make(4, 32, scale=1e-3), (32,), eps=1e-2)
    yield sample("weight_offset", make(4, 40), (40,), weight_offset=1.0)
    if bias:
        yield sample("bias_only", make(3, 20), (20,), weight=False)
        yield sample("weight_only", make(3, 20), (20,), use_bias=False)
    if residual:
        yield sample("wide_residual", make(7, 36), (36,), other=make(7, 36, dtype=torch.float32))
        yield sample("strided_residual", make(6, 36), (36,), other=make(6, 3, 50)[:, 2, 7:43])


def norm_cost(input, normalized_shape, weight=None, bias=None, eps=None, *, weight_offset=0.0) -> Cost:
    """x in, y out; backward: x and dy in, dx out; each parameter once."""
    data = input.numel() * input.element_size()
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    return Cost(2 * data + parameters, 3 * data + 2 * parameters)


def add_norm_cost(input, residual, normalized_shape, weight=None, bias=None, eps=None, **options) -> Cost:
    """Both in, both out; backward: h and the gradients of both outputs in, the inputs' out, once if in one dtype."""
    narrow = input.numel() * input.element_size()
    wide = residual.numel() * residual.element_size()
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    separate = narrow if options.get("dropout_p") or input.dtype != residual.dtype else 0
    return Cost(2 * (narrow + wide) + parameters, narrow + 3 * wide + separate + 2 * parameters)
