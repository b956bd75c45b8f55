"""Which mixture of experts a module is, measured on random inputs with small random parameters of ours."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..ops.gated import GATE_ACTIVATIONS
from .experts import Experts, Gate, Projection, implementation_of
from .probe import Differs, attributes_of, keeps, own_numbers, parts_of, refusal, run, stand_in, undisturbed

SMALL = {"hidden": 8, "inner": 12}  # multiples of 16 bytes in fp32, which torch's grouped product wants
# Scale of inputs -> the error that is taken for roundings, of the largest value. The probes run in fp32, as torch's
# grouped product does: 2e-7 was seen at scale 1, 4e-5 at scale 100, where few products are within a limit of 3.
# Gelu and its form by tanh differ by 3e-4 at scale 0.3.
TOLERANCE = {0.3: 3e-6, 30.0: 5e-5}


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
    name, function = implementation_of(module)
    if function is not None and not str(getattr(function, "__module__", "")).startswith("transformers."):
        return f'its configuration asks for the experts that were registered as "{name}"'
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
                    Gate("silu"), gate, up, down, arguments, order, casts=False,
                    implementation=implementation_of(module), parts=parts_of(dict(module.named_children())),
                    attributes=attributes_of(module),
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
    numbers = [None, *own_numbers(module, sizes)]
    for limit, scale, offset in itertools.product(numbers, numbers, (0.0, 1.0)):
        for activation, interleaved in itertools.product(GATE_ACTIVATIONS, (False, True)):
            yield Gate(activation, interleaved, limit, 1.0 if scale is None else scale, offset)


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

    act = GATE_ACTIVATIONS[experts.form.activation]
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
