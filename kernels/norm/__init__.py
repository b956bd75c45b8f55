"""Triton kernels of layer norm and RMS norm."""
