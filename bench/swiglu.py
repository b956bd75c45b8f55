"""Shapes and rivals of swiglu."""

from importlib import import_module

from .gated import cpu_shapes, halves, shapes, sweep

__all__ = ["cpu_shapes", "rivals", "shapes", "sweep"]


def _liger():
    liger = import_module("liger_kernel.ops")

    def swiglu(gate, up=None):
        return liger.LigerSiLUMulFunction.apply(*halves(gate, up))

    return swiglu


rivals = {"liger-kernel": _liger}
