"""Shapes of geglu."""

from ._gated import shapes

__all__ = ["shapes"]
