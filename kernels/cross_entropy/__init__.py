"""Triton kernels of cross-entropy."""
