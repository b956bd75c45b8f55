"""Shapes of swiglu."""

from ._gated import shapes

__all__ = ["shapes"]
