"""Shapes of add_rms_norm."""

from ._norm import norm_shapes

shapes = norm_shapes(bias=False, residual=True)
