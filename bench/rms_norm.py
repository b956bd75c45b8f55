"""Shapes and rivals of rms_norm."""

from importlib import import_module

from ..ops.norm.call import default_eps
from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=False)
cpu_shapes = norm_shapes(bias=False, of=CPU_SHAPES)
sweep = norm_sweep(bias=False)


def _liger():
    liger = import_module("liger_kernel.transformers.functional")

    def rms_norm(input, normalized_shape, weight, eps=None):
        # In place, its backward overwrites the incoming gradient.
        return liger.liger_rms_norm(input, weight, default_eps(eps, input.dtype), in_place=False)

    return rms_norm


def _quack():
    quack = import_module("quack.rmsnorm")

    def rms_norm(input, normalized_shape, weight, eps=None):
        return quack.rmsnorm(input, weight, eps=default_eps(eps, input.dtype))

    return rms_norm


rivals = {"liger-kernel": _liger, "quack": _quack}
