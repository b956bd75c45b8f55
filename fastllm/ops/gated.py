"""Gated activations, act(gate) * up: SwiGLU and GEGLU (Shazeer 2020, arXiv:2002.05202, equation 6, without its linear
layers)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import extension
from ..backends import KERNEL_DTYPES, free_for_native, pick, under_transform
from ..registry import Cost, Op, Sample, define, register
from .shared.autograd import PLAIN, apply, apply_untransformed, gradients, unwrapped
from .shared.check import beyond_float32, check_floating
from .shared.stand_ins import any_stands_in, overridden

# The activation of the gate, by its name.
GATE_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# geglu's `approximate` -> the activation.
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}


class GatedCall(NamedTuple):
    """A call of a gated activation. ``up`` None: ``gate`` holds both, side by side."""

    gate: torch.Tensor
    up: torch.Tensor | None
    kind: str

    def tensors(self):
        return self.gate, self.up


def _checked(op: str, gate, up, kind: str) -> GatedCall:
    check_floating(op, "gate", gate, nested=True, sparse=True)
    if up is not None:
        check_floating(op, "up", up, nested=True, sparse=True)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: without up, gate holds gate and up side by side and must have an even last dimension, got "
                f"shape {list(gate.shape)}"
            )
    elif up.shape != gate.shape:
        raise ValueError(f"{op}: up must have gate's shape {list(gate.shape)}, got {list(up.shape)}")
    elif up.device != gate.device:
        raise ValueError(f"{op}: up is on {up.device}, gate on {gate.device}; they must be together")
    return GatedCall(gate, up, kind)


def _eager(gate, up, kind: str):
    """PyTorch's own operators."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return GATE_ACTIVATIONS[kind](gate) * up


def gated_reference(gate, up, kind: str):
    """The definition, in at least fp32, rounded once to the dtype that gate and up promote to."""
    dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return _eager(gate.to(wide), None if up is None else up.to(wide), kind).to(dtype)


def _fwd_fake(gate, up, kind):
    shape = (*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape
    return gate.new_empty(shape, dtype=gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype))


@define("gated_fwd(Tensor gate, Tensor? up, str kind) -> Tensor", _fwd_fake)
def _gated_fwd(*args):
    from ..kernels.gated import gated_fwd

    return gated_fwd(*args)


def _bwd_fake(dy, gate, up, kind, needs):
    other = gate if up is None else up
    return (
        gate.new_empty(gate.shape if needs[0] else 0),
        other.new_empty(other.shape if up is not None and needs[1] else 0),
    )


@define("gated_bwd(Tensor dy, Tensor gate, Tensor? up, str kind, bool[2] needs) -> (Tensor, Tensor)", _bwd_fake)
def _gated_bwd(*args):
    from ..kernels.gated import gated_bwd

    return gated_bwd(*args)


# On a CPU, by csrc/cpu/gated.cpp. It knows the kind by its place among GATE_ACTIVATIONS.
_NUMBER = {kind: number for number, kind in enumerate(GATE_ACTIVATIONS)}
_rows = extension.operator("gated_rows", _fwd_fake)
_grad_rows = extension.operator(
    "gated_grad_rows", lambda dy, gate, up, kind, *needs: _bwd_fake(dy, gate, up, kind, needs)
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(gate, up, kind, backend):
        if backend == "native":
            return _rows(gate, up, _NUMBER[kind])
        return _gated_fwd(gate, up, kind)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, up, ctx.kind, ctx.backend = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        if ctx.backend == "native" and not torch.is_grad_enabled() and not under_transform():
            gate, up = ctx.saved_tensors
            needs = ctx.needs_input_grad
            dgate, dup = _grad_rows(dy, gate, up, _NUMBER[ctx.kind], needs[0], needs[1])
            return dgate if needs[0] else None, dup if needs[1] else None, None, None

        def launch(inputs, outputs_grad, extras, needs):
            if ctx.backend == "native":
                return _grad_rows(*outputs_grad, *inputs, _NUMBER[ctx.kind], *needs)
            return _gated_bwd(*outputs_grad, *inputs, ctx.kind, needs)

        def formula(gate, up):
            return gated_reference(gate, up, ctx.kind)

        return *gradients(launch, formula, ctx.saved_tensors, ctx.needs_input_grad[:2], (dy,)), None, None


class _OrdinaryGated(torch.autograd.Function):
    """The same of what :func:`_ordinary` gives to the extension, where nothing transforms the call."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.kind, ctx.backend = kind, "native"
        ctx.save_for_backward(gate, up)
        return _rows(gate, up, _NUMBER[kind])

    @staticmethod
    def backward(ctx, dy):
        return _Gated.backward(ctx, dy)[:3]


def _refuses(backend: str, call: GatedCall) -> str | None:
    return beyond_float32(call.tensors()) if backend == "native" else None


# On a CPU the extension serves every size. PyTorch's operators give the last elements of a tensor other bits than the
# rest, so a row would depend on its batch. One core of an AMD EPYC, forward and backward, PyTorch's time over the
# extension's: 512 x 256 elements 1.1 to 1.5 (silu), 1.0 to 1.4 (gelu) and 2.6 to 3.8 (gelu_tanh), from bfloat16 at AVX2
# to float32 at AVX-512. 8 x 64 take silu 27 us and PyTorch's 21, since autograd calls Python for the gradient.
def _prefers_torch(call: GatedCall) -> str | None:
    if not call.gate.is_cpu:
        return None
    if torch.compiler.is_compiling():
        return "torch.compile makes one loop of PyTorch's two operators"
    return beyond_float32(call.tensors())


def _ordinary(gate, up, kind: str) -> torch.Tensor | None:
    """The result of a call of ordinary tensors of one dtype on a CPU, or None where a call is not that.

    What serves it is known in 1 us, where all checks and :func:`pick`, which decides the same, take 4 to 7.
    """
    if type(gate) not in PLAIN or not gate.is_cpu:
        return None
    if up is None:
        return _ordinary_halves(gate, kind)
    if type(up) not in PLAIN or not up.is_cpu:
        return None
    if gate.is_nested:  # and has no one shape
        return _eager(gate, up, kind)
    if gate.dtype not in KERNEL_DTYPES or gate.dtype is not up.dtype or gate.shape != up.shape:
        return None
    if up.layout is not torch.strided or not free_for_native(gate):
        return None
    return _by_extension(gate, up, kind, gate.requires_grad or up.requires_grad)


def _ordinary_halves(gate, kind: str) -> torch.Tensor | None:
    """The same of one tensor that holds both."""
    if gate.is_nested or gate.dtype not in KERNEL_DTYPES or not free_for_native(gate):
        return None
    return None if gate.dim() == 0 or gate.shape[-1] % 2 else _by_extension(gate, None, kind, gate.requires_grad)


def _by_extension(gate, up, kind: str, differentiable: bool) -> torch.Tensor:
    if differentiable and torch.is_grad_enabled():
        return apply_untransformed(_OrdinaryGated, gate, up, kind)
    return _rows(*unwrapped((gate, up)), _NUMBER[kind])


def _served(op: str, call: GatedCall):
    backend = pick(op, call).backend
    return _eager(*call) if backend == "eager" else apply(_Gated, *call, backend)


def _swiglu_call(gate, up=None) -> GatedCall:
    return _checked("swiglu", gate, up, "silu")


def swiglu_reference(gate, up=None):
    """The definition, in at least fp32, rounded once."""
    return gated_reference(gate, up, "silu")


def swiglu(gate, up=None):
    """``silu(gate) * up``, fused: each tensor is read or written once, forward and backward.

    Args:
        gate: floating point, any shape and strides. Without ``up`` it holds both, (..., 2 N), the gate first, as one
            linear layer returns them. The gradient has the same layout, so it needs no concatenation.
        up: of the gate's shape, or None. Its dtype may differ.

    Returns:
        A tensor of the gate's shape (without ``up``: (..., N)), in the dtype that gate and up promote to. Computed in
        fp32 at least, rounded once.

    Raises:
        TypeError: ``gate`` or ``up`` is not a floating-point tensor.
        ValueError: shapes or devices do not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    found = _ordinary(gate, up, "silu")
    if found is not None:
        return found
    return overridden(swiglu, gate, up) if any_stands_in(gate, up) else _served("swiglu", _swiglu_call(gate, up))


class SwiGLU(torch.nn.Module):
    """:func:`swiglu` as a module: ``forward(gate, up=None)``.

    Shape:
        ``gate`` and ``up`` (..., N) give (..., N). ``gate`` (..., 2 N) alone gives (..., N), from its halves.
    """

    def forward(self, gate, up=None):
        return swiglu(gate, up)


def _kind(approximate: str) -> str:
    if not isinstance(approximate, str) or approximate not in _APPROXIMATE:
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _APPROXIMATE[approximate]


def _geglu_call(gate, up=None, *, approximate="none") -> GatedCall:
    return _checked("geglu", gate, up, _kind(approximate))


def geglu_reference(gate, up=None, *, approximate="none"):
    """The definition, in at least fp32, rounded once."""
    return gated_reference(gate, up, _kind(approximate))


def geglu(gate, up=None, *, approximate="none"):
    """``gelu(gate, approximate=approximate) * up``, fused: each tensor is read or written once, forward and backward.

    Args:
        gate, up: as in :func:`fastllm.functional.swiglu`, the halves of one tensor included.
        approximate: "none" (by erf) or "tanh", as in ``torch.nn.functional.gelu``.

    Returns:
        As :func:`fastllm.functional.swiglu`.

    Raises:
        TypeError: ``gate`` or ``up`` is not a floating-point tensor.
        ValueError: shapes, devices or ``approximate`` do not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    kind = _kind(approximate)
    found = _ordinary(gate, up, kind)
    if found is not None:
        return found
    if any_stands_in(gate, up):
        return overridden(geglu, gate, up, approximate=approximate)
    return _served("geglu", _checked("geglu", gate, up, kind))


class GEGLU(torch.nn.Module):
    """:func:`geglu` as a module: ``forward(gate, up=None)``.

    Args:
        approximate: "none" for GELU by the error function, "tanh" for its approximation, as in torch.nn.GELU.

    Shape:
        ``gate`` and ``up`` (..., N) give (..., N). ``gate`` (..., 2 N) alone gives (..., N), from its halves.
    """

    def __init__(self, approximate: str = "none"):
        super().__init__()
        _kind(approximate)
        self.approximate = approximate

    def forward(self, gate, up=None):
        return geglu(gate, up, approximate=self.approximate)

    def extra_repr(self):
        return f"approximate={self.approximate!r}"


def _samples(device, dtype):
    def make(*shape, scale=2.0, dtype=dtype):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    yield Sample("pair", (make(7, 63), make(7, 63)))
    yield Sample("packed", (make(3, 5, 70),))
    yield Sample("long", (make(2, 1500), make(2, 1500)))
    yield Sample("packed_wide", (make(3, 2 * 1100),))
    yield Sample("halves_of_one", tuple(make(4, 6, 96).chunk(2, -1)))
    yield Sample("row_stride", (make(6, 64)[:, 5:38], make(6, 33)))
    yield Sample("transposed", (make(40, 6).t(), make(6, 40)))
    yield Sample("expanded", (make(1, 20).expand(4, 20), make(4, 20)))
    yield Sample("wide_up", (make(4, 20), make(4, 20, dtype=torch.float32)))
    yield Sample("frozen_up", (make(4, 20), make(4, 20).detach()))
    yield Sample("no_rows", (make(0, 8), make(0, 8)))
    yield Sample("scalar", (make(), make()))
    yield Sample("large", (make(4, 32, scale=40.0), make(4, 32)))


def _geglu_samples(device, dtype):
    for i, sample in enumerate(_samples(device, dtype)):
        approximate = ("none", "tanh")[i % 2]
        yield replace(sample, name=f"{sample.name}_{approximate}", kwargs={"approximate": approximate})


def _examples(device, **options):
    for name, dtype in (("float32", torch.float32), ("16 bits", torch.bfloat16), ("float64", torch.float64)):
        gate = torch.empty(8, device=device, dtype=dtype)
        yield Sample(name, (gate, gate), options)


def _geglu_examples(device):
    for approximate in _APPROXIMATE:
        for sample in _examples(device, approximate=approximate):
            yield replace(sample, name=f"{sample.name} by {'erf' if approximate == 'none' else 'tanh'}")


def _cost(gate, up=None, **options) -> Cost:
    """Both in, y out; backward: both and y's gradient in, theirs out."""
    inputs = sum(t.numel() * t.element_size() for t in (gate, up) if t is not None)
    output = inputs // 2 if up is None else gate.numel() * torch.promote_types(gate.dtype, up.dtype).itemsize
    return Cost(inputs + output, 2 * inputs + output)


def _record(function: Callable, summary: str, **fields) -> Op:
    return Op(
        name=function.__name__,
        summary=summary,
        function=function,
        cost=_cost,
        backends=("eager", "triton", "native"),
        refuses=_refuses,
        prefers_torch=_prefers_torch,
        **fields,
    )


register(
    _record(
        swiglu,
        "silu(gate) * up, of two tensors or of the halves of one",
        reference=swiglu_reference,
        samples=_samples,
        module=SwiGLU,
        call=_swiglu_call,
        examples=_examples,
    )
)
register(
    _record(
        geglu,
        "gelu(gate) * up, of two tensors or of the halves of one; exact or by tanh",
        reference=geglu_reference,
        samples=_geglu_samples,
        module=GEGLU,
        call=_geglu_call,
        examples=_geglu_examples,
    )
)
