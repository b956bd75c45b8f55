"""Shapes and rivals of layer_norm."""

from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=True)
cpu_shapes = norm_shapes(bias=True, of=CPU_SHAPES)
sweep = norm_sweep(bias=True)


def _liger():
    from liger_kernel.transformers.functional import liger_layer_norm

    def layer_norm(input, normalized_shape, weight, bias, eps=1e-5):
        return liger_layer_norm(input, weight, bias, eps)

    return layer_norm


rivals = {"liger-kernel": _liger}
