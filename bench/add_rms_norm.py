"""Shapes and rivals of add_rms_norm."""

from ..ops.norm.call import default_eps
from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=False, residual=True)
cpu_shapes = norm_shapes(bias=False, residual=True, of=CPU_SHAPES)
sweep = norm_sweep(bias=False, residual=True)


def _liger():
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def add_rms_norm(input, residual, normalized_shape, weight, eps=None):
        # In place, its backward overwrites the incoming gradient.
        return liger_fused_add_rms_norm(input, residual, weight, default_eps(eps, input.dtype), in_place=False)

    return add_rms_norm


def _quack():
    from quack.rmsnorm import rmsnorm

    def add_rms_norm(input, residual, normalized_shape, weight, eps=None):
        return rmsnorm(input, weight, residual=residual, eps=default_eps(eps, input.dtype), prenorm=True)

    return add_rms_norm


rivals = {"liger-kernel": _liger, "quack": _quack}
