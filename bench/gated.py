"""Shapes that the gated activations share: (tokens, intermediate size) of real models' MLPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..registry import Sample

SHAPES = {
    "Llama-3 8B 8192x14336": (8192, 14336),
    "Llama-3 1B 8192x8192": (8192, 8192),
    "Gemma-2 2B 8192x9216": (8192, 9216),
    "one token 1x14336": (1, 14336),
}


def _call(rows, cols, packed, device, dtype) -> Sample:
    if packed:
        return Sample("", (torch.randn(rows, 2 * cols, device=device, dtype=dtype).requires_grad_(),))
    return Sample("", tuple(torch.randn(rows, cols, device=device, dtype=dtype).requires_grad_() for _ in range(2)))


shapes: dict[str, Callable[[torch.device, torch.dtype], Sample]] = {
    f"{name}{' packed' if packed else ''}": partial(_call, *shape, packed)
    for packed in (False, True)
    for name, shape in SHAPES.items()
}
cpu_shapes = {"Llama-3 8B 128x14336": partial(_call, 128, 14336, False)}

# As many elements each, more than any L2 cache holds.
sweep = ("columns", {n: partial(_call, (1 << 25) // n, n, False) for n in (1024, 2048, 4096, 8192, 16384, 32768)})


def halves(gate, up):
    """Both tensors of a call; of a packed one the two views."""
    return gate.chunk(2, -1) if up is None else (gate, up)
