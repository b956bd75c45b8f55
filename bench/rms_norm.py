"""Shapes and rivals of rms_norm."""

from ..ops.norm.call import default_eps
from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=False)
cpu_shapes = norm_shapes(bias=False, of=CPU_SHAPES)
sweep = norm_sweep(bias=False)


def _liger():
    from liger_kernel.transformers.functional import liger_rms_norm

    def rms_norm(input, normalized_shape, weight, eps=None):
        # In place, its backward overwrites the incoming gradient.
        return liger_rms_norm(input, weight, default_eps(eps, input.dtype), in_place=False)

    return rms_norm


def _quack():
    from quack.rmsnorm import rmsnorm

    def rms_norm(input, normalized_shape, weight, eps=None):
        return rmsnorm(input, weight, eps=default_eps(eps, input.dtype))

    return rms_norm


rivals = {"liger-kernel": _liger, "quack": _quack}
