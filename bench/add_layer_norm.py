"""Shapes of add_layer_norm."""

from ._norm import norm_shapes

shapes = norm_shapes(bias=True, residual=True)
