"""Shapes and rivals of layer_norm."""

from importlib import import_module

from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=True)
cpu_shapes = norm_shapes(bias=True, of=CPU_SHAPES)
sweep = norm_sweep(bias=True)


def _liger():
    liger = import_module("liger_kernel.transformers.functional")

    def layer_norm(input, normalized_shape, weight, bias, eps=1e-5):
        return liger.liger_layer_norm(input, weight, bias, eps)

    return layer_norm


rivals = {"liger-kernel": _liger}
