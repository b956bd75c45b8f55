"""Gated MLPs by behaviour: down(activation(gate(x)) * up(x)), whatever the class and the names of its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..functional import geglu, swiglu
from .calls import own
from .deferred import value_of
from .plain import only_input, plain
from .probe import Attributes, Parts, as_measured, changed
from .swap import forward_of


@dataclass(frozen=True)
class GatedMLP:
    """Names of the parts: ``gate`` is all of a packed projection where ``up`` is None.

    ``limit`` bounds the gate from above, and the other factor from both sides, before the product (DeepSeek V4).
    ``others`` are the parts beside linear layers and dropouts, an activation, with the class and the attributes that
    each had when it was measured; ``attributes`` are the module's own. ``dtypes`` are the inputs' dtypes in which it is
    this MLP, ``autocast`` the dtypes of autocast under which it is: some code casts its output or repairs one dtype's.
    """

    formula: str
    gate: str
    up: str | None
    down: str
    inner: str | None  # the dropout before down
    outer: str | None  # and after it
    limit: float | None
    others: Parts
    argument: str
    attributes: Attributes
    dtypes: tuple[torch.dtype, ...]
    autocast: tuple[torch.dtype, ...]

    @property
    def op(self) -> str:
        return "swiglu" if self.formula == "swiglu" else "geglu"

    def __str__(self):
        inner = f"{self.gate}(x)" if self.up is None else f"{self.gate}(x), {self.up}(x)"
        clamped = "" if self.limit is None else ", clamped"
        return f"{self.down}({self.formula}({inner}{clamped}))"


@forward_of("gated_mlp")
def gated_mlp_forward(module, original, mlp: GatedMLP, *args, **kwargs):
    x = value_of(only_input(args, kwargs, mlp.argument))
    if x is None:
        return original(module, *args, **kwargs)
    down = getattr(module, mlp.down)
    if changed(module, mlp.attributes) or not as_measured(module, mlp.others):
        own(mlp.op, "its attributes or parts have changed since it was measured")
        return original(module, x)
    if not plain(x) or not x.is_floating_point():
        own(mlp.op, "tensors that it does not take, or vmap, tracing or forward-mode differentiation")
        return original(module, x)
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype not in mlp.dtypes or (autocast and torch.get_autocast_dtype(x.device.type) not in mlp.autocast):
        own(mlp.op, "a dtype, or autocast, in which it was measured to be another")
        return original(module, x)
    gate = getattr(module, mlp.gate)(x)
    up = None if mlp.up is None else getattr(module, mlp.up)(x)
    weight = down._parameters.get("weight")  # the attribute may be a parametrization, computed at each look
    weight = next(down.parameters(), None) if weight is None else weight
    if weight is not None and weight.dtype != gate.dtype and not autocast:
        own(mlp.op, "its projections give another dtype than the last one takes")
        return original(module, x)
    gate, up = clamped_factors(gate, up, mlp.limit)
    if mlp.formula == "swiglu":
        y = swiglu(gate, up)
    else:
        y = geglu(gate, up, approximate="tanh" if mlp.formula == "geglu_tanh" else "none")
    y = down(y if mlp.inner is None else getattr(module, mlp.inner)(y))
    return y if mlp.outer is None else getattr(module, mlp.outer)(y)


def clamped_factors(gate, up, limit: float | None):
    """The two factors between their bounds; ``up`` is None where ``gate`` is both and nothing bounds them."""
    if limit is None:
        return gate, up
    if up is None:
        gate, up = gate.chunk(2, -1)
    return gate.clamp(max=limit), up.clamp(-limit, limit)
