"""Shapes and rivals of geglu; Gemma's approximates by tanh."""

from functools import partial

from ..registry import Sample
from . import gated as _gated

cpu_shapes = _gated.cpu_shapes
sweep = _gated.sweep


def _by_tanh(make, device, dtype) -> Sample:
    call = make(device, dtype)
    return Sample(call.name, call.args, {"approximate": "tanh"})


shapes = {name: partial(_by_tanh, make) if name.startswith("Gemma") else make for name, make in _gated.shapes.items()}


def _liger():
    from liger_kernel.transformers.functional import liger_geglu

    def geglu(gate, up=None, *, approximate="none"):
        if approximate != "tanh":
            raise NotImplementedError("approximates by tanh only")
        return liger_geglu(*_gated.halves(gate, up))

    return geglu


rivals = {"liger-kernel": _liger}
