"""Shapes of linear: (rows, in_features, out_features) of real models' layers."""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Sample

SHAPES = {
    "Llama-3 8B up 8192x4096x14336": (8192, 4096, 14336),
    "one token 1x4096x14336": (1, 4096, 14336),
}
CPU_SHAPES = {
    "GPT-2 124M up 512x768x3072": (512, 768, 3072),
    "512 wide 128x512x1376": (128, 512, 1376),
    "four tokens 4x768x3072": (4, 768, 3072),
}


def _call(rows, columns, outputs, device, dtype) -> Sample:
    x, weight = (torch.randn(n, columns, device=device, dtype=dtype) for n in (rows, outputs))
    return Sample("", (x.requires_grad_(), (weight / columns**0.5).requires_grad_()))


shapes = {name: partial(_call, *shape) for name, shape in SHAPES.items()}
cpu_shapes = {name: partial(_call, *shape) for name, shape in CPU_SHAPES.items()}
