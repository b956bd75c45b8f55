"""A linear layer, x @ weight.T + bias.

It is fast also in 16 bits on CPUs without 16-bit products, and in fp32 on AMD's CPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import extension
from ..backends import Choice, free_for_torch, operators_alone, pick
from ..cpu import multiplies
from ..registry import Cost, Op, Sample, define, register
from .linear_rows import MAX_ROWS, linear_rows
from .shared import onednn
from .shared.autograd import PLAIN, apply, autocasted, autocasts, gradients, unwatched
from .shared.check import check_floating
from .shared.stand_ins import any_stands_in, overridden, stands_in
from .shared.widened import NARROW, widened_input_grad, widened_linear, widened_weight_grad, widens

OP = "linear"
TORCH, WIDENED, ROWS, ONEDNN = "PyTorch's operator", "blocks in float32", "rows by the extension", "oneDNN"
# Rows from which blocks pay where there is a gradient. One core of an AMD EPYC held to AVX2, weights of 512 x 512,
# 2048 x 2048, 2048 x 5504, ms: 2 rows 0.045 / 0.54 / 1.5 by PyTorch and 0.049 / 0.72 / 2.8 in blocks, 4 rows
# 0.088 / 1.10 / 3.2 and 0.063 / 0.98 / 3.3, 16 rows 0.35 / 7.8 / 26 and 0.12 / 2.0 / 5.8. Fewer are a decoder's step.
MIN_ROWS = 4
# Rows up to which the extension reads the weight once in 16 bits, where there is no gradient. The same three, while
# other work took the cores: 8 rows 0.08 / 1.6 / 4.4 by the extension and 0.37 / 1.9 / 4.9 in blocks, 12 rows
# 0.12 / 2.7 / 7.4 and 0.41 / 2.2 / 5.7.
MAX_NARROW_ROWS = 8
# Elements of a weight from which the extension multiplies up to MAX_ROWS rows of float32 on the CPUs that onednn.py
# names. Processor time of PyTorch's over the extension's, one thread of an AMD EPYC, AVX-512 and AVX2, 1 row and 5:
# 256 x 256 1.35, 0.98 and 1.27, 0.86; 512 x 512 1.18, 1.21 and 1.26, 1.19; 2048 x 2048 1.48, 1.13 and 1.39, 1.14;
# 8192 x 512 1.91, 2.38 and 2.94, 2.39.
MIN_FLOATS = 2**18
# Elements of a float32 weight from which a layer is given to :func:`linear` at all: 1024 rows are enough for oneDNN at
# AVX-512 then. A guess.
LEAST_WEIGHT = 2**14


class LinearCall(NamedTuple):
    """A call as one value. ``weight`` (N, K), or (K,) as torch has it."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def tensors(self):
        return tuple(self)


class LinearForm(NamedTuple):
    """``name``: TORCH, WIDENED, ROWS or ONEDNN."""

    name: str
    why: str


def _call(input, weight, bias=None) -> LinearCall:
    for name, x in (("input", input), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
            check_floating(OP, name, x, nested=True, sparse=True)
    if weight.dim() not in (1, 2) or input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{OP}: weight must be (out_features, in_features) with in_features the last dimension of input, got "
            f"input {list(input.shape)}, weight {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"{OP}: bias must have shape {list(weight.shape[:-1])}, got {list(bias.shape)}")
    input, weight, bias = autocasted(input, weight, bias)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(f"{OP}: {name} must have input's dtype {input.dtype}, got {x.dtype}")
        if x is not None and x.device != input.device:
            raise ValueError(f"{OP}: {name} is on {x.device}, input on {input.device}; they must be together")
    return LinearCall(input, weight, bias)


_OWN = LinearForm(TORCH, "its products are the device's own")
_ASKED = LinearForm(TORCH, "the backend eager is asked for")
_FEW = LinearForm(TORCH, f"below {MIN_ROWS} rows blocks do not pay, and the extension does not take the call")
_ROWS = LinearForm(ROWS, f"up to {MAX_NARROW_ROWS} rows the extension reads the weight once, in 16 bits")
_FLOAT_ROWS = LinearForm(
    ROWS, f"up to {MAX_ROWS} rows the extension multiplies faster than the library that PyTorch takes"
)
_FOREIGN = LinearForm(TORCH, "a transform or a program, a sparse or nested tensor, or a weight that is a vector")
_BLOCKS = LinearForm(WIDENED, "this CPU has no products of that dtype")
_ONEDNN = LinearForm(ONEDNN, "oneDNN multiplies that dtype faster here than PyTorch's library")


def takes_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the extension multiplies a few rows ``x`` with ``weight``, a matrix of its dtype.

    It must be there, nothing may be differentiated, and the elements of a row of ``weight`` must be side by side.
    """
    if x.numel() == 0 or weight.numel() == 0 or weight.stride(1) != 1 or extension.missing() is not None:
        return False
    if operators_alone():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias))


def max_step_rows(weight: torch.Tensor) -> int:
    """Rows up to which :func:`takes_rows` decides whether the extension multiplies them with ``weight`` (N, K)."""
    if widens(weight):
        return MAX_NARROW_ROWS
    return MAX_ROWS if weight.numel() >= MIN_FLOATS and onednn.is_float_of_amd(weight) else 0


def _float_form(call: LinearCall) -> LinearForm:
    """The form of a call whose products are in hardware."""
    x, weight, bias = call
    if weight.dim() != 2 or not onednn.is_float_of_amd(weight) or operators_alone():
        return _OWN
    if any(t is not None and t.layout != torch.strided for t in call):
        return _OWN
    # Who looks at operators, to count or to record them, knows PyTorch's.
    if not (torch.compiler.is_compiling() or unwatched(*call)):
        return _OWN
    if x.numel() <= max_step_rows(weight) * x.shape[-1] and takes_rows(x, weight, bias):
        return _FLOAT_ROWS
    return _ONEDNN if onednn.onednn_serves(x, weight) else _OWN


def pays(weight: torch.Tensor) -> str | None:
    """Why :func:`linear` of many rows is faster with ``weight`` (N, K) than PyTorch's operator; None: it is not."""
    if widens(weight):
        return _BLOCKS.why
    if torch._C._get_tracing_state() is not None:
        return None  # sizes are tensors there, and the program is to be PyTorch's
    if weight.numel() >= LEAST_WEIGHT and onednn.onednn_may_serve(weight):
        return _ONEDNN.why
    return _FLOAT_ROWS.why if weight.numel() >= MIN_FLOATS and onednn.is_float_of_amd(weight) else None


def linear_form(call: LinearCall, choice: Choice) -> LinearForm:
    """What serves a call, and why."""
    x, weight, _ = call
    if not widens(x):
        return _ASKED if choice.asked else _float_form(call)
    if (
        operators_alone()
        or weight.dim() != 2
        or any(t is not None and (t.layout != torch.strided or t.is_nested) for t in call)
    ):
        return _FOREIGN
    if x.numel() <= MAX_NARROW_ROWS * x.shape[-1] and takes_rows(*call):
        return _ROWS
    return _FEW if x.numel() < MIN_ROWS * x.shape[-1] or weight.numel() == 0 else _BLOCKS


def _plainly_torchs(input, weight, bias) -> bool:
    """Whether a call of ordinary matrices on a CPU, without autocast, fits and is PyTorch's by :func:`linear_form`.

    It takes 1 us, where all checks and the form take 4.
    """
    if type(input) not in PLAIN or type(weight) not in PLAIN or not input.is_cpu or not weight.is_cpu:
        return False
    if input.is_nested:  # and has no one shape
        return True
    dtype = input.dtype
    if dtype is not weight.dtype or weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return False
    if not input.is_floating_point() or (dtype in NARROW and not multiplies(dtype)) or autocasts("cpu"):
        return False
    if onednn.onednn_serves(input, weight) or input.numel() <= max_step_rows(weight) * input.shape[-1]:
        return False
    if bias is not None and (
        type(bias) not in PLAIN or bias.dtype is not dtype or not bias.is_cpu or bias.shape != weight.shape[:1]
    ):
        return False
    return free_for_torch()


def linear_reference(input, weight, bias=None):
    """The definition, in at least fp32, rounded once."""
    wide = torch.promote_types(input.dtype, torch.float32)
    return F.linear(input.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(input.dtype)


def _fwd_fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@define("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fwd_fake)
def _linear_fwd(x, weight, bias):
    if not widens(x):
        return onednn.onednn_product(x, weight, bias)
    # Autocast would narrow the blocks again.
    with torch.autocast(x.device.type, enabled=False):
        return widened_linear(x, weight, bias, _fwd_fake(x, weight, bias))


def _bwd_fake(dy, x, weight, needs):
    """The weight's gradient laid out as the weight, which takes it as it is; empty where not needed."""
    dx = x.new_empty(x.shape if needs[0] else 0)
    dw = torch.empty_like(weight) if needs[1] else weight.new_empty(0)
    return dx, dw, x.new_empty(weight.shape[0] if needs[2] else 0)


@define("linear_bwd(Tensor dy, Tensor x, Tensor weight, bool[3] needs) -> (Tensor, Tensor, Tensor)", _bwd_fake)
def _linear_bwd(dy, x, weight, needs):
    dx, dw, db = _bwd_fake(dy, x, weight, needs)
    with torch.autocast(x.device.type, enabled=False):
        if needs[0]:
            dx = widened_input_grad(dy, weight, dx) if widens(dy) else onednn.onednn_product(dy, weight.t())
        if needs[1]:
            if widens(dy):
                widened_weight_grad(dy, x, dw)
            else:
                found = onednn.onednn_product(dy.t(), x.t())
                dw = found if dw.is_contiguous() else dw.copy_(found)
        if needs[2]:
            db.copy_(dy.sum(0, dtype=torch.float32))
    return dx, dw, db


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _linear_fwd(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        def launch(inputs, outputs_grad, extras, needs):
            x, weight, _ = inputs
            return _linear_bwd(*outputs_grad, x, weight, needs)

        return gradients(launch, linear_reference, ctx.saved_tensors, ctx.needs_input_grad, (dy,))


def linear(input, weight, bias=None):
    """``torch.nn.functional.linear``: ``input @ weight.T + bias``.

    On a CPU without products of a 16-bit dtype, blocks of the tensors are widened to fp32 and multiplied there, forward
    and backward, so that a 16-bit model runs at the speed of an fp32 one in half its memory. A call of up to 8 rows
    that needs no gradient reads the weight once, in 16 bits. On AMD's CPUs with AVX-512 large products in fp32 are
    oneDNN's. On AMD's CPUs up to 5 rows in fp32 that need no gradient are the extension's. All other calls are
    PyTorch's operator.

    Args:
        input: (..., in_features), floating point, any strides.
        weight: (out_features, in_features), in input's dtype; under autocast each is cast as PyTorch casts it.
        bias: (out_features,) or None.

    Returns:
        (..., out_features) in input's dtype, or in autocast's. Products and sums are in fp32 at least; in blocks the
        result, with its bias, is rounded once.

    Raises:
        TypeError: a tensor is not floating-point, or dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    if _plainly_torchs(input, weight, bias):
        return F.linear(input, weight, bias)
    if any_stands_in(input, weight, bias):
        return overridden(linear, input, weight, bias)
    call = _call(input, weight, bias)
    form = linear_form(call, pick(OP, call)).name
    if form == TORCH:
        return F.linear(*call)
    if form == ROWS:
        return linear_rows(*call)
    x, weight, bias = call
    return apply(_Linear, x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with the same arguments and state_dict keys, multiplied by :func:`linear` where that pays."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        weight = self.weight  # no tensor where torch.fx traces
        product = linear if stands_in(weight) or pays(weight) is not None else F.linear
        return product(input, weight, self.bias)


def _samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    yield Sample("matrix", (make(7, 63), make(20, 63), make(20)))
    yield Sample("no_bias", (make(2, 5, 32), make(65, 32)))
    yield Sample("blocks", (make(520, 24), make(300, 24, scale=0.2), make(300)))
    yield Sample("transposed_weight", (make(9, 24), make(24, 10).t(), make(10)))
    yield Sample("row_stride", (make(6, 64)[:, 5:38], make(8, 33), make(8)))
    yield Sample("transposed", (make(40, 6).t(), make(5, 40), None))
    yield Sample("expanded", (make(1, 20).expand(6, 20), make(1, 20).expand(4, 20), make(1).expand(4)))
    yield Sample("frozen_weight", (make(8, 16), make(12, 16).detach(), make(12).detach()))
    yield Sample("frozen_input", (make(8, 16).detach(), make(12, 16), make(12)))
    yield Sample("one_row", (make(1, 16), make(12, 16), make(12)))
    yield Sample("vector", (make(16), make(12, 16)))
    yield Sample("no_rows", (make(0, 16), make(12, 16), make(12)))
    yield Sample("no_columns", (make(8, 16), make(0, 16), make(0)))


def _examples(device):
    """What differs between dtypes, and with the number of rows, for a layer of 1024 x 1024 that needs no gradient."""
    for dtype in (torch.float32, *NARROW):
        weight = torch.empty(1024, 1024, device=device, dtype=dtype)
        for name, rows in (("one row", 1), ("512 rows", 512)):
            sample = (weight[:rows], weight, None)
            yield Sample(f"{str(dtype).removeprefix('torch.')} of {name}", sample)


def _cost(input, weight, bias=None) -> Cost:
    """Inputs once, the output once; backward reads them and the gradient and writes the inputs' gradients."""
    size, rows = input.element_size(), input.numel() // max(input.shape[-1], 1)
    held = input.numel() + weight.numel() + (0 if bias is None else bias.numel())
    out = rows * (weight.shape[0] if weight.dim() == 2 else 1)
    flops = 2 * rows * weight.numel()
    needed = sum(t.requires_grad for t in (input, weight))
    written = sum(t.numel() for t in (input, weight, bias) if t is not None and t.requires_grad)
    return Cost((held + out) * size, (held + out + written) * size, flops, needed * flops)


register(
    Op(
        name=OP,
        summary="input @ weight.T + bias; 16-bit tensors also on CPUs without 16-bit products, fp32 by oneDNN on AMD's",
        function=linear,
        reference=linear_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager",),
        call=_call,
        form=linear_form,
        module=Linear,
        examples=_examples,
    )
)
