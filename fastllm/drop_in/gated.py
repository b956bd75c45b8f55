"""Gated MLPs by behaviour: down(activation(gate(x)) * up(x)), whatever the class and the names of its parts."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..functional import geglu, swiglu
from .deferred import value_of
from .norms import changed, settings_of
from .plain import hooked, plain
from .swap import forward_of

FORMULAS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class GatedMLP:
    """Names of the parts: ``gate`` is all of a packed projection where ``up`` is None; the rest runs in order."""

    formula: str
    gate: str
    up: str | None
    down: str
    dropout: str | None
    activation: str | None  # a part that is a module, and its class
    activation_class: type | None
    argument: str
    settings: tuple[tuple[str, object], ...]

    @property
    def op(self) -> str:
        return "swiglu" if self.formula == "swiglu" else "geglu"

    def __str__(self):
        inner = f"{self.gate}(x)" if self.up is None else f"{self.gate}(x), {self.up}(x)"
        return f"{self.down}({self.formula}({inner}))"


@forward_of("gated_mlp")
def gated_mlp_forward(module, original, mlp: GatedMLP, *args, **kwargs):
    if len(args) == 1 and not kwargs:
        (x,) = args
    elif not args and len(kwargs) == 1 and mlp.argument in kwargs:
        x = kwargs[mlp.argument]
    else:
        return original(module, *args, **kwargs)
    x = value_of(x)
    down = getattr(module, mlp.down)
    parts = [module._modules.get(mlp.activation), module._modules.get(mlp.dropout)]
    if mlp.activation is not None and type(parts[0]) is not mlp.activation_class:
        return original(module, x)
    looked_at = any(part is not None and hooked(part) for part in parts)
    if looked_at or changed(module, mlp) or not plain(x) or not x.is_floating_point():
        return original(module, x)
    gate = getattr(module, mlp.gate)(x)
    up = None if mlp.up is None else getattr(module, mlp.up)(x)
    weight = getattr(down, "weight", None)
    if weight is not None and weight.dtype != gate.dtype and not torch.is_autocast_enabled(x.device.type):
        return original(module, x)
    if mlp.formula == "swiglu":
        y = swiglu(gate, up)
    else:
        y = geglu(gate, up, approximate="tanh" if mlp.formula == "geglu_tanh" else "none")
    return down(y if mlp.dropout is None else getattr(module, mlp.dropout)(y))


def _activations(module) -> list[str]:
    return [name for name, part in module.named_children() if not isinstance(part, nn.Linear | nn.Dropout)]


def looks_like_gated(module: nn.Module) -> bool:
    """Two or three linear layers whose shapes fit, at most one activation and one dropout, no parameters of its own."""
    if any(True for _ in module.parameters(recurse=False)):
        return False
    parts = list(module.children())
    linears = [p for p in parts if isinstance(p, nn.Linear)]
    if len(linears) not in (2, 3) or len(parts) - len(linears) > 2 or isinstance(module, nn.Sequential):
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
    if any(b is not None for b in module._buffers.values()):
        return "it keeps buffers, on which its forward may depend"
    arguments = list(inspect.signature(type(module).forward).parameters)
    if len(arguments) < 2:
        return "its forward takes no input"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            return _recognise(module, arguments[1])
        except Exception as error:
            message = str(error).split("\n")[0][:120]
            return f"its forward does not take a lone random tensor ({type(error).__name__}: {message})"


def _recognise(module, argument: str) -> GatedMLP | str:
    linears = {name: p for name, p in module.named_children() if isinstance(p, nn.Linear)}
    dropouts = [name for name, p in module.named_children() if isinstance(p, nn.Dropout)]
    activations = _activations(module)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for gate, up, down in _roles(linears):
        small = _small_layers(linears, gate, up, down)
        probe = _probe(module, small)
        leaf = x.clone().requires_grad_()
        y = type(module).forward(probe, leaf)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            return "its forward does not return one tensor of its input's shape"
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        for formula, activation in FORMULAS.items():
            other = x.clone().requires_grad_()
            first = small[gate](other)
            a, b = first.chunk(2, -1) if up is None else (first, small[up](other))
            truth = small[down](activation(a) * b)
            (want,) = torch.autograd.grad(truth.sum(), other)
            if _close(y, truth) and _close(grad, want):
                return GatedMLP(
                    formula, gate, up, down, dropouts[0] if dropouts else None,
                    activations[0] if activations else None,
                    type(module._modules[activations[0]]) if activations else None, argument, settings_of(module),
                )  # fmt: skip
    return "its forward is none of swiglu, geglu and geglu by tanh between its layers"


def _close(a, b) -> bool:
    return bool(((a - b).abs().amax() <= 1e-6 * b.abs().amax()).item())


def _small_layers(linears, gate: str, up: str | None, down: str) -> dict[str, nn.Linear]:
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


def _probe(module, small: dict[str, nn.Linear]):
    """``module`` with ``small`` for its linear layers and no dropout; hooks do not run, ``module`` is not touched."""
    probe = object.__new__(type(module))
    state = dict(vars(module))
    parts = {n: nn.Identity() if isinstance(p, nn.Dropout) else p for n, p in module._modules.items()}
    state["_modules"] = parts | small
    probe.__dict__ = state
    return probe
