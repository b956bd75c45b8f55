"""Shapes that the norms share: (rows, columns) of real models' hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..registry import Sample

# The most telling first: a run with a time budget takes them in this order.
SHAPES = {
    "Llama-3 8B 8192x4096": (8192, 4096),
    "GPT-2 8192x768": (8192, 768),
    "one token 1x4096": (1, 4096),
    "widest 32768x65536": (32768, 65536),
    "Llama-3 70B 8192x8192": (8192, 8192),
    "Gemma-2 2B 8192x2304": (8192, 2304),
    "Qwen2.5-7B 8192x3584": (8192, 3584),
    "BERT-base 4096x768": (4096, 768),
    "GPT-2 XL 8192x1600": (8192, 1600),
    "head norm 262144x128": (262144, 128),
    "wide 4096x16384": (4096, 16384),
}

# What a CPU trains and serves with.
CPU_SHAPES = {"GPT-2 1024x768": (1024, 768), "Llama-3 8B 256x4096": (256, 4096)}


# As many elements each, more than any L2 cache holds.
SWEEP = {cols: ((1 << 25) // cols, cols) for cols in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)}


def norm_sample(name: str, size: tuple[int, int], bias: bool, residual: bool, device, dtype) -> Sample:
    """A call on tensors of ``size``, rows and columns, that all require a gradient."""
    rows, cols = size
    parameters = {"weight": torch.ones(cols, device=device, dtype=dtype).requires_grad_()}
    if bias:
        parameters["bias"] = torch.zeros(cols, device=device, dtype=dtype).requires_grad_()
    inputs = [torch.randn(rows, cols, device=device, dtype=dtype).requires_grad_() for _ in range(1 + residual)]
    return Sample(name, (*inputs, (cols,)), parameters)


def norm_shapes(
    *, bias: bool, residual: bool = False, of: dict[str, tuple[int, int]] = SHAPES
) -> dict[str, Callable[[torch.device, torch.dtype], Sample]]:
    """Name -> ``make(device, dtype)`` of the call; parameters come in the input's dtype."""
    return {name: partial(norm_sample, name, size, bias, residual) for name, size in of.items()}


def norm_sweep(*, bias: bool, residual: bool = False):
    """(axis, size -> ``make``) of calls that differ in columns."""
    return "columns", {cols: partial(norm_sample, "", size, bias, residual) for cols, size in SWEEP.items()}
