"""Shapes of add_layer_norm."""

from ._norm import norm_shapes, norm_sweep

shapes = norm_shapes(bias=True, residual=True)
sweep = norm_sweep(bias=True, residual=True)
