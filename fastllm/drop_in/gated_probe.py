"""Which gated MLP a module's forward is, by outputs and gradients on random inputs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..ops.gated import GATE_ACTIVATIONS
from .gated import GatedMLP, clamped_factors
from .probe import Differs, attributes_of, found_or_why, keeps, own_numbers, parts_of, run, stand_in

FORMULAS = {
    "swiglu": GATE_ACTIVATIONS["silu"],
    "geglu": GATE_ACTIVATIONS["gelu"],
    "geglu_tanh": GATE_ACTIVATIONS["gelu_tanh"],
}
AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *AUTOCAST_DTYPES)


def looks_like_gated(module: nn.Module) -> bool:
    """Two or three linear layers whose shapes fit, at most three parts beside them, no parameters of its own."""
    if any(True for _ in module.parameters(recurse=False)):
        return False
    parts = list(module.children())
    linears = [p for p in parts if isinstance(p, nn.Linear)]
    if len(linears) not in (2, 3) or len(parts) - len(linears) > 3 or isinstance(module, nn.Sequential):
        return False
    others = [p for p in parts if not isinstance(p, nn.Linear)]
    if any(any(True for _ in p.parameters()) or any(True for _ in p.children()) for p in others):
        return False
    return bool(_roles({name: p for name, p in module.named_children() if isinstance(p, nn.Linear)}))


def _roles(linears: dict[str, nn.Linear]) -> list[tuple[str, str | None, str]]:
    """(gate, up, down) that the shapes allow."""
    if len(linears) == 2:
        return [
            (a, None, b)
            for a, b in itertools.permutations(linears)
            if linears[a].out_features == 2 * linears[b].in_features
        ]
    return [
        (a, b, c)
        for a, b, c in itertools.permutations(linears)
        if linears[a].in_features == linears[b].in_features
        and linears[a].out_features == linears[b].out_features == linears[c].in_features
        and linears[c].out_features == linears[a].in_features
    ]


def recognise_gated(module: nn.Module) -> GatedMLP | str:
    """What gated MLP ``module``'s forward is, by outputs and gradients with small random layers in place of its own."""
    for part in (module, *(p for p in module.children() if not isinstance(p, nn.Linear))):
        if (why := keeps(part)) is not None:
            return why
    arguments = list(inspect.signature(type(module).forward).parameters)
    if len(arguments) < 2:
        return "its forward takes no input"
    return found_or_why(_recognise, module, arguments[1])


class _Stage(nn.Module):
    """Stands for a dropout: no other place in the forward, and no other stage there, gives the same outputs."""

    def __init__(self, frequency: float):
        super().__init__()
        self.frequency = frequency

    def forward(self, x):
        return x + torch.sin(self.frequency * x)


class _Form(NamedTuple):
    """The first fields of a :class:`GatedMLP`."""

    formula: str
    gate: str
    up: str | None
    down: str
    inner: str | None
    outer: str | None
    limit: float | None


class _Probe(NamedTuple):
    """``module``'s forward on layers of ours. ``stages`` stand for its dropouts; ``others`` are its other parts."""

    module: nn.Module
    stages: Mapping[str | None, nn.Module]
    others: Mapping[str, nn.Module]

    def run(self, layers: dict[str, nn.Linear], x: torch.Tensor, training: bool) -> torch.Tensor:
        """The output for ``x``, with ``layers`` for the module's linear layers."""
        acting = {name: stand_in(part, training) for name, part in self.others.items()}
        parts = {**self.stages, **layers, **acting}
        replaced = {name: parts.get(name) for name in self.module._modules}
        y = run(stand_in(self.module, training, _modules=replaced), x)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            raise Differs("its forward does not return one tensor of its input's shape")
        return y

    def outputs(self, layers: dict[str, nn.Linear], x: torch.Tensor, training: bool):
        """(what :meth:`run` gives, the gradients of the input and of the parameters of ``layers``)."""
        leaf = x.clone().requires_grad_()
        y = self.run(layers, leaf, training)
        return y.detach(), _gradients(y, leaf, layers)

    def truth(self, form: _Form, layers: dict[str, nn.Linear]) -> _GatedProduct:
        """What ``form`` says, of ``layers``."""
        up = None if form.up is None else layers[form.up]
        inner, outer = self.stages[form.inner], self.stages[form.outer]
        return _GatedProduct(
            FORMULAS[form.formula], layers[form.gate], up, layers[form.down], inner, outer, form.limit
        )  # fmt: skip


def _recognise(module, argument: str) -> GatedMLP | str:
    linears = {name: p for name, p in module.named_children() if isinstance(p, nn.Linear)}
    dropouts = [name for name, p in module.named_children() if isinstance(p, nn.Dropout)]
    others = {name: p for name, p in module.named_children() if name not in linears and name not in dropouts}
    stages = {name: _Stage(1.0 + i) for i, name in enumerate(dropouts)} | {None: nn.Identity()}
    probe = _Probe(module, stages, others)
    for gate, up, down in _roles(linears):
        small = _small_layers(linears, up, down)
        measured = [(x, *probe.outputs(small, x, training)) for x, training in _inputs()]
        for limit, formula, inner, outer in itertools.product(
            _limits(module), FORMULAS, (None, *dropouts), (None, *dropouts)
        ):
            form = _Form(formula, gate, up, down, inner, outer, limit)
            if all(_same(probe.truth(form, small), small, *each) for each in measured):
                dtypes, autocast = _agreeing(probe, form, small)
                return GatedMLP(*form, parts_of(others), argument, attributes_of(module), dtypes, autocast)
    return "its forward is none of swiglu, geglu and geglu by tanh, clamped or not, between its layers"


def _agreeing(
    probe: _Probe, form: _Form, small: dict[str, nn.Linear]
) -> tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]:
    """In which dtypes the module is the MLP that it is in fp64, and in which of autocast's."""

    def agrees(dtype: torch.dtype, autocast: torch.dtype | None = None) -> bool:
        layers = {name: copy.deepcopy(layer).to(dtype) for name, layer in small.items()}
        return _agrees(probe.truth(form, layers), partial(probe.run, layers), dtype, autocast)

    dtypes = tuple(dtype for dtype in DTYPES if agrees(dtype))
    if not dtypes:
        raise Differs("its forward repairs values, casts its output or asks for its input's layout")
    return dtypes, tuple(dtype for dtype in AUTOCAST_DTYPES if agrees(torch.float32, dtype))


def _limits(module) -> list[float | None]:
    """What may bound the factors: None, and the module's own numbers that are no sizes of its layers."""
    sizes = {size for part in module.children() for p in part.parameters() for size in p.shape}
    return [None, *own_numbers(module, sizes)]


class _GatedProduct(NamedTuple):
    """``outer(down(inner(act(gate(x)) * up(x))))``; without ``up``, ``gate`` gives both halves."""

    act: Callable
    gate: nn.Linear
    up: nn.Linear | None
    down: nn.Linear
    inner: Callable
    outer: Callable
    limit: float | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        first = self.gate(x)
        a, b = first.chunk(2, -1) if self.up is None else (first, self.up(x))
        a, b = clamped_factors(a, b, self.limit)
        return self.outer(self.down(self.inner(self.act(a) * b)))


def _inputs() -> list[tuple[torch.Tensor, bool]]:
    """Inputs and modes: what is random in training, depends on dimensions or bounds large values is found out."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1.0, (3, 5, 6), True), (1.0, (4, 6), False), (4.0, (5, 6), True), (1e5, (2, 1, 3, 6), True))
    return [(s * torch.randn(*n, generator=generator, dtype=torch.float64), training) for s, n, training in shapes]


def _gradients(y, leaf, small):
    parameters = [p for layer in small.values() for p in layer.parameters()]
    return torch.autograd.grad(y.sum(), [leaf, *parameters], allow_unused=True)


def _same(truth, small, x, y, grads) -> bool:
    leaf = x.clone().requires_grad_()
    want = truth(leaf)
    pairs = zip(grads, _gradients(want, leaf, small), strict=True)
    return _close(y, want.detach()) and all(g is not None and _close(g, t) for g, t in pairs)


def _agrees(truth, forward: Callable, dtype: torch.dtype, autocast: torch.dtype | None) -> bool:
    """Whether ``forward(x, training)`` gives what ``truth`` gives of ``dtype``: dtype, and values to some roundings.

    ``autocast``: the dtype of the autocast that both are under; None for none.
    NaN, infinities and what overflows in fp16 on the way must become the same, too.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 6, generator=generator).t()  # some code asks for the layout
    # Of the scales some overflow in fp16 in the last sum alone, some before it.
    scales = torch.tensor([1.0, 1.0, 40.0, 60.0, 80.0, 100.0, 1e4])
    broken = scales[:, None] * torch.randn(7, 6, generator=generator)
    broken[0, 0], broken[1, 0] = float("nan"), float("inf")
    eps = torch.finfo(autocast or dtype).eps
    try:
        with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            for given, training in itertools.product((x.to(dtype), broken.to(dtype)), (True, False)):
                y, want = forward(given, training), truth(given)
                finite = want.isfinite()
                if y.dtype != want.dtype or not torch.equal(y.isfinite(), finite):
                    return False
                y, want = y[finite].double(), want[finite].double()
                # 32 roundings of the largest value: a guess, eight products and their sum take fewer.
                if want.numel() and (y - want).abs().amax() > 32 * eps * want.abs().amax():
                    return False
    except Exception:  # foreign code: what it refuses is not swapped
        return False
    return True


def _close(a, b) -> bool:
    # In fp64, whose roundings are 1e-16; gelu and its form by tanh differ by 3e-4.
    return bool(((a - b).abs().amax() <= 1e-6 * b.abs().amax()).item())


def _small_layers(linears, up: str | None, down: str) -> dict[str, nn.Linear]:
    generator = torch.Generator().manual_seed(1)
    small = {}
    for name, layer in linears.items():
        rows, columns = (6, 8) if name == down else (16 if up is None else 8, 6)
        bias = layer.bias is not None
        made = torch.nn.utils.skip_init(nn.Linear, columns, rows, bias=bias, dtype=torch.float64)
        for parameter in made.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        small[name] = made
    return small
