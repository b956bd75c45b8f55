"""Mixtures of experts by behaviour: each token's experts, down(act(gate(x)) * up(x)), kept in parameters of three
dimensions."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..functional import geglu, swiglu
from .calls import own
from .deferred import value_of
from .plain import plain
from .probe import (
    Differs,
    Parts,
    as_measured,
    changed,
    keeps,
    parts_of,
    refusal,
    run,
    settings_of,
    stand_in,
    undisturbed,
)
from .swap import forward_of

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
SMALL = {"hidden": 8, "inner": 12}  # multiples of 16 bytes in fp32, which torch's grouped product wants
# Scale of inputs -> the error that is taken for roundings, of the largest value. The probes run in fp32, as torch's
# grouped product does: 2e-7 was seen at scale 1, 4e-5 at scale 100, where few products are within a limit of 3.
# Gelu and its form by tanh differ by 3e-4 at scale 0.3.
TOLERANCE = {0.3: 3e-6, 30.0: 5e-5}


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
    ``settings`` are what it had when it was measured, ``implementation`` what transformers' configuration asked for.
    """

    form: Gate
    gate: Projection
    up: Projection | None
    down: Projection
    arguments: tuple[str, str, str]
    order: tuple[str, ...]
    casts: bool
    implementation: str | None
    parts: Parts
    settings: tuple[tuple[str, object], ...]

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


def _implementation(module) -> str | None:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


@forward_of("experts")
def experts_forward(module, original, experts: Experts, *args, **kwargs):
    given = experts.bound(args, kwargs)
    why = "arguments that were not measured" if given is None else _unfit(module, experts, *given)
    if given is not None and why is None:
        x, numbers, weights = given
        sizes = None
        if not torch.compiler.is_compiling():  # the sizes are data: a compiler keeps the original forward
            order = numbers.flatten().sort(stable=True)
            sizes = _sizes(order.values, getattr(module, experts.down.name).shape[0])
        if sizes is not None:
            autocast = torch.is_autocast_enabled(x.device.type) and experts.casts
            with torch.autocast(x.device.type, enabled=autocast):
                return _mixed(module, experts, x, weights, order.indices, sizes)
        why = "a compiler's graph, or numbers beyond its experts"
    own(experts.op, why or "arguments that were not measured")
    return original(module, *args, **kwargs)


def _unfit(module, experts: Experts, x, numbers, weights) -> str | None:
    """Why the original forward takes this call, or None."""
    if changed(module, experts.settings) or not as_measured(module, experts.parts):
        return "its attributes or parts have changed since it was measured"
    if _implementation(module) != experts.implementation:
        return "the configuration asks for another implementation of experts than when it was measured"
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


def _matrices(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3}


def looks_like_experts(module: nn.Module) -> bool:
    """Two or three own parameters of three dimensions: a matrix for each expert."""
    return len(_matrices(module)) in (2, 3)


def _layouts(module: nn.Module) -> Iterator[tuple[Projection, Projection | None, Projection]]:
    """(gate, up, down) that the parameters' shapes allow."""
    matrices = _matrices(module)
    biases = {n: p for n, p in module._parameters.items() if p is not None and n not in matrices}
    if len({len(p) for p in matrices.values()}) > 1 or (biases and len(biases) != len(matrices)):
        return
    for names in itertools.permutations(matrices):
        for turned in itertools.product((False, True), repeat=2):
            flags = (turned[0],) * (len(names) - 1) + (turned[1],)
            shapes = [
                matrices[n].shape[:0:-1] if t else matrices[n].shape[1:] for n, t in zip(names, flags, strict=True)
            ]
            (outs, hidden), (rows, inner) = shapes[0], shapes[-1]
            packed = 2 if len(names) == 2 else 1
            if rows != hidden or outs != packed * inner or any(s != shapes[0] for s in shapes[:-1]):
                continue
            for of_bias in itertools.permutations(biases) if biases else [(None,) * len(names)]:
                wanted = [(len(matrices[n]), s[0]) for n, s in zip(names, shapes, strict=True)]
                if biases and [tuple(biases[b].shape) for b in of_bias if b is not None] != wanted:
                    continue
                made = [Projection(*each) for each in zip(names, of_bias, flags, strict=True)]
                yield made[0], (None if packed == 2 else made[1]), made[-1]


def recognise_experts(module: nn.Module) -> Experts | str:
    """What mixture of gated experts ``module`` is, by its outputs and gradients with small random parameters."""
    for part in (module, *module.children()):
        if (why := keeps(part)) is not None:
            return why
    if any(list(part.parameters()) or list(part.children()) for part in module.children()):
        return "it has parts that have parameters or parts of their own"
    layouts = list(_layouts(module))
    if not layouts:
        return "its parameters are no packed or separate gate and up projections, and down, for each expert"
    order = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if len(order) != 3:
        return "its forward does not take hidden states, the experts' numbers and their weights"
    why = ""
    with undisturbed():
        for gate, up, down in layouts:
            for arguments in (order, (order[0], order[2], order[1])):
                experts = Experts(
                    Gate("silu"), gate, up, down, arguments, order, casts=False, implementation=_implementation(module),
                    parts=parts_of(dict(module.named_children())), settings=settings_of(module),
                )  # fmt: skip
                try:
                    return _recognise(module, experts)
                except Differs as error:
                    why = str(error)
                except Exception as error:
                    why = why or refusal(error, "such tensors")
    return why


def _recognise(module, experts: Experts) -> Experts:
    small = _small_parameters(module, experts)
    count = len(small[experts.down.name])
    measured = [
        (tolerance, inputs, *_outputs(module, experts, small, inputs, training))
        for tolerance, inputs, training in _inputs(count)
    ]
    for form in _forms(module):
        if all(_same(replace(experts, form=form), small, *each) for each in measured):
            return replace(experts, form=form, casts=_casts(module, experts, small, measured[0][1]))
    raise Differs("its forward is none of swiglu, geglu and geglu by tanh, clamped or not, between its projections")


def _forms(module) -> Iterator[Gate]:
    sizes = {size for p in module.parameters(recurse=False) for n in p.shape for size in (n, n // 2)}
    given = [v for v in vars(module).values() if type(v) is float or (type(v) is int and v not in sizes)]
    numbers = [None, *(v for v in given if 0 < v < 1e4)]
    for limit, scale, offset in itertools.product(dict.fromkeys(numbers), dict.fromkeys(numbers), (0.0, 1.0)):
        for activation, interleaved in itertools.product(ACTIVATIONS, (False, True)):
            yield Gate(activation, interleaved, limit, 1.0 if scale is None else float(scale), offset)


def _inputs(count: int) -> Iterator[tuple[float, tuple[torch.Tensor, torch.Tensor, torch.Tensor], bool]]:
    """Tolerances, inputs and modes: limits decide at the largest, what is random in training is found out."""
    generator = torch.Generator().manual_seed(0)
    for scale, tokens, training in ((0.3, 7, True), (0.3, 5, False), (30.0, 6, True)):
        x = scale * torch.randn(tokens, SMALL["hidden"], generator=generator, dtype=torch.float32)
        each = min(count, 2)
        numbers = torch.rand(tokens, count, generator=generator, dtype=torch.float32).topk(each).indices
        weights = torch.rand(tokens, each, generator=generator, dtype=torch.float32) + 0.1
        yield TOLERANCE[scale], (x, numbers, weights), training


def _outputs(module, experts: Experts, small, inputs, training: bool):
    """The output of ``module``'s forward with ``small`` for its parameters, and all the gradients."""
    x, numbers, weights = inputs
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    parameters = {name: p.clone().requires_grad_() for name, p in small.items()}
    parts = {name: stand_in(part, training) for name, part in module.named_children()}
    acting = stand_in(module, training, _parameters=dict.fromkeys(module._parameters) | parameters, _modules=parts)
    named = dict(zip(experts.arguments, (leaves[0], numbers, leaves[1]), strict=True))
    y = run(acting, *(named[name] for name in experts.order))
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        raise Differs("its forward does not return one tensor of the hidden states' shape")
    grads = torch.autograd.grad(y.square().sum(), [*leaves, *parameters.values()], allow_unused=True)
    return y.detach(), grads


def _same(experts: Experts, small, tolerance: float, inputs, y, grads) -> bool:
    x, numbers, weights = (t.double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    parameters = {name: p.double().requires_grad_() for name, p in small.items()}
    want = _truth(experts, parameters, x, numbers, weights)
    if not _close(y, want.detach(), tolerance):
        return False
    leaves = [x, weights, *parameters.values()]
    truths = torch.autograd.grad(want.square().sum(), leaves, allow_unused=True)
    return all(g is not None and _close(g, t, tolerance) for g, t in zip(grads, truths, strict=True))


def _truth(experts: Experts, parameters, x, numbers, weights):
    def by(projection: Projection, rows, expert: int):
        weight = parameters[projection.name][expert]
        y = rows @ (weight if projection.transposed else weight.mT)
        return y if projection.bias is None else y + parameters[projection.bias][expert]

    act = ACTIVATIONS[experts.form.activation]
    sums = [torch.zeros_like(x)]
    for expert in numbers.unique().tolist():
        first = by(experts.gate, x, expert)
        gate, up = experts.form.split(first) if experts.up is None else (first, by(experts.up, x, expert))
        gate, up = experts.form.factors(gate, up)
        y = by(experts.down, act(gate) / experts.form.scale * up, expert)
        sums.append(y * (weights * (numbers == expert)).sum(1, keepdim=True))
    return torch.stack(sums).sum(0)


def _close(a, b, tolerance: float) -> bool:
    return bool(((a.double() - b).abs().amax() <= tolerance * b.abs().amax()).item())


def _small_parameters(module, experts: Experts) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = len(getattr(module, experts.down.name))
    packed = (2 if experts.up is None else 1) * SMALL["inner"]
    shapes = {experts.gate: (packed, SMALL["hidden"]), experts.down: (SMALL["hidden"], SMALL["inner"])}
    if experts.up is not None:
        shapes[experts.up] = (packed, SMALL["hidden"])
    made = {}
    for projection, (rows, columns) in shapes.items():
        weight = torch.randn(count, rows, columns, generator=generator, dtype=torch.float32)
        made[projection.name] = weight.mT.contiguous() if projection.transposed else weight
        if projection.bias is not None:
            made[projection.bias] = torch.randn(count, rows, generator=generator, dtype=torch.float32)
    return made


def _casts(module, experts: Experts, small, inputs) -> bool:
    """Whether autocast has its products in 16 bits: its output is then off by more than fp32's roundings."""
    y, _ = _outputs(module, experts, small, inputs, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = _outputs(module, experts, small, inputs, training=True)
    return not _close(narrow, y.double(), 1e-4)
