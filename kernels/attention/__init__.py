"""Triton and Gluon kernels of attention."""
