"""Mixtures of experts by behaviour: each token's experts, down(act(gate(x)) * up(x)), kept in parameters of three
dimensions."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..functional import geglu, swiglu
from .calls import own
from .deferred import value_of
from .plain import plain
from .probe import Attributes, Parts, as_measured, changed
from .swap import forward_of


@dataclass(frozen=True)
class Gate:
    """act(scale * min(gate, limit)) / scale * (clamp(up, -limit, limit) + offset); without a limit nothing is clamped.

    ``interleaved``: gate and up are the even and the odd columns of a packed projection, not its halves.
    """

    activation: str
    interleaved: bool = False
    limit: float | None = None
    scale: float = 1.0
    offset: float = 0.0

    def split(self, packed):
        # unbind, not two slices: the gradient of each slice would be as large as both.
        return packed.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else packed.chunk(2, -1)

    @property
    def simple(self) -> bool:
        return self.limit is None and self.scale == 1.0 and self.offset == 0.0

    def factors(self, gate, up):
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (gate if self.scale == 1.0 else gate * self.scale), (up + self.offset if self.offset else up)

    def product(self, first, up, product):
        """The gated product of ``first`` and ``up``; of the packed ``first`` where ``up`` is None."""
        if up is None and self.simple and not self.interleaved:
            return product(first, None)
        y = product(*self.factors(*(self.split(first) if up is None else (first, up))))
        return y if self.scale == 1.0 else y / self.scale


@dataclass(frozen=True)
class Projection:
    """A parameter of one matrix for each expert, (out, in) or, ``transposed``, (in, out), and that of their biases."""

    name: str
    bias: str | None
    transposed: bool

    def product(self, module, x, sizes: list[int]) -> torch.Tensor:
        """Rows of ``x``, ``sizes`` of them for each expert, by that expert's matrix and bias."""
        weight = getattr(module, self.name)
        bias = None if self.bias is None else getattr(module, self.bias)
        if _has_grouped_product(x, weight):
            of_each = torch.tensor(sizes, device=x.device)
            y = F.grouped_mm(x, weight if self.transposed else weight.mT, offs=of_each.cumsum(0, dtype=torch.int32))
            return y if bias is None else y + bias.repeat_interleave(of_each, 0, output_size=len(x))
        # unbind, not weight[i]: the gradient of each weight[i] would be as large as all the experts.
        matrices, biases = (
            p.unbind() if p is not None and torch.is_grad_enabled() and p.requires_grad else p for p in (weight, bias)
        )
        groups = zip(
            [e for e, size in enumerate(sizes) if size], x.split([size for size in sizes if size]), strict=True
        )
        assert matrices is not None
        multiply = _times if self.transposed else F.linear
        return torch.cat([multiply(rows, matrices[e], None if biases is None else biases[e]) for e, rows in groups])


@dataclass(frozen=True)
class Experts:
    """Names of the parameters: ``gate`` is all of a packed projection where ``up`` is None.

    ``arguments`` are the forward's names of the hidden states (tokens, hidden), of the experts' numbers and of their
    weights, both (tokens, experts of a token). ``casts``: under autocast its products are in 16 bits. ``parts`` and
    ``attributes`` are what it had when it was measured, ``implementation`` what transformers' configuration asked for
    then: a name, and the function that was registered by it, None for the module's own code.
    """

    form: Gate
    gate: Projection
    up: Projection | None
    down: Projection
    arguments: tuple[str, str, str]
    order: tuple[str, ...]
    casts: bool
    implementation: tuple[str | None, Callable | None]
    parts: Parts
    attributes: Attributes

    @property
    def op(self) -> str:
        return "swiglu" if self.form.activation == "silu" else "geglu"

    def __str__(self):
        inner = self.gate.name if self.up is None else f"{self.gate.name}, {self.up.name}"
        clamped = "" if self.form.simple else ", clamped or scaled"
        return f"each token's experts, {self.down.name}({self.op}({inner}{clamped})), on tokens sorted by expert"

    def bound(self, args: tuple, kwargs: dict) -> list | None:
        """(hidden states, numbers, weights) of a call, or None where it gives others."""
        given = dict(zip(self.order, args, strict=False)) | kwargs
        if len(given) != 3 or len(args) + len(kwargs) != 3 or set(given) != set(self.arguments):
            return None
        return [value_of(given[name]) for name in self.arguments]


def implementation_of(module) -> tuple[str | None, Callable | None]:
    """The name of the experts that transformers' configuration of ``module`` asks for, and what is registered by it."""
    name = getattr(getattr(module, "config", None), "_experts_implementation", None)
    registered = getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", {})
    return name, registered.get(name)


@forward_of("experts")
def experts_forward(module, original, experts: Experts, *args, **kwargs):
    if torch.compiler.is_compiling():  # how many tokens each expert has is data
        return original(module, *args, **kwargs)
    given = experts.bound(args, kwargs)
    why = "arguments that were not measured" if given is None else _unfit(module, experts, *given)
    if given is not None and why is None:
        x, numbers, weights = given
        order = numbers.flatten().sort(stable=True)
        sizes = _sizes(order.values, getattr(module, experts.down.name).shape[0])
        if sizes is not None:
            autocast = torch.is_autocast_enabled(x.device.type) and experts.casts
            with torch.autocast(x.device.type, enabled=autocast):
                return _mixed(module, experts, x, weights, order.indices, sizes)
        why = "numbers beyond its experts"
    own(experts.op, why or "arguments that were not measured")
    return original(module, *args, **kwargs)


def _unfit(module, experts: Experts, x, numbers, weights) -> str | None:
    """Why the original forward takes this call, or None."""
    if changed(module, experts.attributes) or not as_measured(module, experts.parts):
        return "its attributes or parts have changed since it was measured"
    if implementation_of(module) != experts.implementation:
        return "the configuration asks for another implementation of experts, or another is registered by its name"
    if not all(isinstance(tensor, torch.Tensor) for tensor in (x, numbers, weights)):
        return "arguments that are no tensors"
    parameters = [p for p in module.parameters(recurse=False) if p is not None]
    if not plain(x, numbers, weights, *parameters) or any(t.device != x.device for t in (numbers, weights)):
        return "tensors that it does not take, or vmap, tracing or forward-mode differentiation"
    cast = torch.is_autocast_enabled(x.device.type) and experts.casts
    if (
        x.dim() != 2
        or numbers.dim() != 2
        or numbers.shape != weights.shape
        or len(numbers) != len(x)
        or numbers.numel() == 0
        or numbers.dtype != torch.int64
        or not weights.is_floating_point()
        or not x.is_floating_point()
        or not (cast or all(p.dtype == x.dtype for p in parameters))
    ):
        return "shapes or dtypes that were not measured"
    return None


def _sizes(numbers, count: int) -> list[int] | None:
    """How many of the sorted ``numbers`` each of ``count`` experts has; None where one is no expert's."""
    bounds = torch.searchsorted(numbers, torch.arange(count + 1, device=numbers.device)).tolist()
    if bounds[0] != 0 or bounds[-1] != len(numbers):
        return None
    return [end - start for start, end in itertools.pairwise(bounds)]


def _mixed(module, experts: Experts, x, weights, order, sizes: list[int]):
    """The sum of each token's experts: ``order`` is the (token, expert) pairs' by expert, ``sizes`` their numbers."""
    tokens, each = weights.shape
    rows = x.index_select(0, order // each)
    first = experts.gate.product(module, rows, sizes)
    up = None if experts.up is None else experts.up.product(module, rows, sizes)
    y = experts.form.product(first, up, _PRODUCTS[experts.form.activation])
    y = experts.down.product(module, y, sizes)
    y = y * weights.flatten().index_select(0, order).unsqueeze(-1)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return y.index_select(0, back).unflatten(0, (tokens, each)).sum(1).to(x.dtype)


_PRODUCTS = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": lambda gate, up: geglu(gate, up, approximate="tanh"),
}


def _times(x, weight, bias):
    # A product with the transpose would give the weight's gradient transposed, which unbind's backward must then copy.
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _has_grouped_product(x, weight) -> bool:
    """Whether torch has one kernel for all the experts: in bf16 on a GPU, with strides of multiples of 16 bytes."""
    return (
        x.is_cuda
        and hasattr(F, "grouped_mm")
        and x.dtype == weight.dtype == torch.bfloat16
        and all(n % 8 == 0 for n in weight.shape[1:])
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
