"""Shapes and rivals of swiglu."""

from .gated import cpu_shapes, halves, shapes, sweep

__all__ = ["cpu_shapes", "rivals", "shapes", "sweep"]


def _liger():
    from liger_kernel.ops import LigerSiLUMulFunction

    def swiglu(gate, up=None):
        return LigerSiLUMulFunction.apply(*halves(gate, up))

    return swiglu


rivals = {"liger-kernel": _liger}
