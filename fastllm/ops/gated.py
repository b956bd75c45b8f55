"""What the gated activations share: checks, the registered operators and their gradient, samples, least bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import extension
from ..backends import KERNEL_DTYPES, chosen_backend, pick_by_tensors
from ..registry import Cost, Sample, define
from .shared.autograd import apply, gradients
from .shared.check import check_floating

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def check_gated(op: str, gate, up) -> None:
    for name, tensor in (("gate", gate), ("up", up)):
        if name == "gate" or up is not None:
            check_floating(op, name, tensor)
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


def gated_eager(gate, up, kind: str):
    """PyTorch's own operators."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return _ACTIVATIONS[kind](gate) * up


def gated_reference(gate, up, kind: str):
    """The definition, in at least fp32, rounded once to the dtype that gate and up promote to."""
    dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return gated_eager(gate.to(wide), None if up is None else up.to(wide), kind).to(dtype)


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


# On a CPU, by csrc/cpu/gated.cpp; the kind is its place among _ACTIVATIONS.
_rows = extension.operator("gated_rows", _fwd_fake)
_grad_rows = extension.operator("gated_grad_rows", lambda *args: _bwd_fake(*args[:4], args[4:]))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(gate, up, kind, backend):
        if backend == "native":
            return _rows(gate, up, list(_ACTIVATIONS).index(kind))
        return _gated_fwd(gate, up, kind)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, up, ctx.kind, ctx.backend = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        def launch(inputs, outputs_grad, extras, needs):
            if ctx.backend == "native":
                return _grad_rows(*outputs_grad, *inputs, list(_ACTIVATIONS).index(ctx.kind), *needs)
            return _gated_bwd(*outputs_grad, *inputs, ctx.kind, needs)

        def formula(gate, up):
            return gated_reference(gate, up, ctx.kind)

        return *gradients(launch, formula, ctx.saved_tensors, ctx.needs_input_grad[:2], (dy,)), None, None


# Elements of the gate from which, on a CPU, the extension is faster: getting to it takes 30 us each way. In 16 bits
# PyTorch's silu and erf are as fast at any size.
LEAST = {"silu": 1 << 20, "gelu": 1 << 20, "gelu_tanh": 1 << 16}


def _torch_is_faster(gate, up, kind: str) -> bool:
    """Whether PyTorch's own two operators beat the extension on a CPU; compiled, they are one loop."""
    if torch.compiler.is_compiling():
        return True
    dtypes = {gate.dtype} if up is None else {gate.dtype, up.dtype}
    if kind != "gelu_tanh" and torch.float32 not in dtypes:
        return True
    return not dtypes <= set(KERNEL_DTYPES) or gate.numel() < LEAST[kind]


def gated_exception(*kinds: str) -> Callable[[str], str | None]:
    """What ``info`` says of it."""

    def exception(device_type: str) -> str | None:
        if device_type != "cpu" or chosen_backend() != "auto" or extension.missing() is not None:
            return None
        words = {"silu": "16 bits or", "gelu": "erf in 16 bits or", "gelu_tanh": "tanh of"}
        calls = (f"{words[kind]} fewer than {LEAST[kind]} elements" for kind in kinds)
        return f"{', '.join(calls)}, and float64: eager"

    return exception


def gated(op: str, gate, up, kind: str):
    """``act(gate) * up``, checked, by the backend that serves this call."""
    check_gated(op, gate, up)
    if chosen_backend() == "auto" and gate.device.type == "cpu" and _torch_is_faster(gate, up, kind):
        return gated_eager(gate, up, kind)
    wide = any(t is not None and t.dtype not in KERNEL_DTYPES for t in (gate, up))
    refuses = "it computes in float32, for float32, float16 and bfloat16" if wide else None
    backend = pick_by_tensors(op, gate, up, refused={"native": refuses})
    return gated_eager(gate, up, kind) if backend == "eager" else apply(_Gated, gate, up, kind, backend)


def gated_samples(device, dtype):
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


def gated_cost(gate, up=None, **options) -> Cost:
    """Both in, y out; backward: both and y's gradient in, theirs out."""
    inputs = sum(t.numel() * t.element_size() for t in (gate, up) if t is not None)
    output = inputs // 2 if up is None else gate.numel() * torch.promote_types(gate.dtype, up.dtype).itemsize
    return Cost(inputs + output, 2 * inputs + output)
