"""Shapes and rivals of geglu; Gemma's approximates by tanh."""

from functools import partial
from importlib import import_module

from ..registry import Sample
from . import gated as _gated

cpu_shapes = _gated.cpu_shapes
sweep = _gated.sweep


def _by_tanh(make, device, dtype) -> Sample:
    call = make(device, dtype)
    return Sample(call.name, call.args, {"approximate": "tanh"})


shapes = {name: partial(_by_tanh, make) if name.startswith("Gemma") else make for name, make in _gated.shapes.items()}


def _liger():
    liger = import_module("liger_kernel.transformers.functional")

    def geglu(gate, up=None, *, approximate="none"):
        if approximate != "tanh":
            raise NotImplementedError("approximates by tanh only")
        return liger.liger_geglu(*_gated.halves(gate, up))

    return geglu


rivals = {"liger-kernel": _liger}
