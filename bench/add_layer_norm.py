"""Shapes of add_layer_norm."""

from .norms import CPU_SHAPES, norm_shapes, norm_sweep

shapes = norm_shapes(bias=True, residual=True)
cpu_shapes = norm_shapes(bias=True, residual=True, of=CPU_SHAPES)
sweep = norm_sweep(bias=True, residual=True)
