"""Shapes and rivals of add_rms_norm."""

from importlib import import_module

from ..ops.norm.call import default_eps
from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=False, residual=True)
cpu_shapes = norm_shapes(bias=False, residual=True, of=CPU_SHAPES)
sweep = norm_sweep(bias=False, residual=True)


def _liger():
    liger = import_module("liger_kernel.transformers.functional")

    def add_rms_norm(input, residual, normalized_shape, weight, eps=None):
        # In place, its backward overwrites the incoming gradient.
        return liger.liger_fused_add_rms_norm(input, residual, weight, default_eps(eps, input.dtype), in_place=False)

    return add_rms_norm


def _quack():
    quack = import_module("quack.rmsnorm")

    def add_rms_norm(input, residual, normalized_shape, weight, eps=None):
        return quack.rmsnorm(input, weight, residual=residual, eps=default_eps(eps, input.dtype), prenorm=True)

    return add_rms_norm


rivals = {"liger-kernel": _liger, "quack": _quack}
