"""Shapes of linear_cross_entropy: (tokens, hidden size, vocabulary) of real models' heads."""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Sample

SHAPES = {
    "GPT-2 8192x768x50304": (8192, 768, 50304),
    "Llama-3 8B 4096x4096x128256": (4096, 4096, 128256),
    "Llama-3 8B 16384x4096x128256": (16384, 4096, 128256),
    "Gemma-2 2B 8192x2304x256000": (8192, 2304, 256000),
}


def _call(name, rows, hidden, classes, device, dtype) -> Sample:
    x = torch.randn(rows, hidden, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(classes, hidden, device=device, dtype=dtype) / hidden**0.5).requires_grad_()
    options = {"softcap": 30.0} if name.startswith("Gemma") else {}
    return Sample(name, (x, w, torch.randint(0, classes, (rows,), device=device)), options)


shapes = {name: partial(_call, name, *shape) for name, shape in SHAPES.items()}
