"""Shapes of cross_entropy: (tokens, vocabulary) of real models' training steps."""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Sample

SHAPES = {
    "Llama-2 8192x32000": (8192, 32000),
    "GPT-2 8192x50304": (8192, 50304),
    "Llama-3 8192x128256": (8192, 128256),
    "Gemma-2 4096x256000": (4096, 256000),
    "bytes 65536x256": (65536, 256),
    "small 4096x4096": (4096, 4096),
}


def _call(name, rows, classes, device, dtype) -> Sample:
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    return Sample(name, (logits, torch.randint(0, classes, (rows,), device=device)))


shapes = {name: partial(_call, name, *shape) for name, shape in SHAPES.items()}
