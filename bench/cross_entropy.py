"""Shapes and rivals of cross_entropy: (tokens, vocabulary) of real models' training steps."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch

from ..registry import Sample
from .cases import Overwriting

SHAPES = {
    "Llama-2 8192x32000": (8192, 32000),
    "GPT-2 8192x50304": (8192, 50304),
    "Llama-3 8192x128256": (8192, 128256),
    "Gemma-2 4096x256000": (4096, 256000),
    "bytes 65536x256": (65536, 256),
    "small 4096x4096": (4096, 4096),
    "one sequence 128x50304": (128, 50304),
}


def _call(name, rows, classes, device, dtype) -> Sample:
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    return Sample(name, (logits, torch.randint(0, classes, (rows,), device=device)))


shapes = {name: partial(_call, name, *shape) for name, shape in SHAPES.items()}
cpu_shapes = {"GPT-2 256x50304": partial(_call, "", 256, 50304), "Llama-3 64x128256": partial(_call, "", 64, 128256)}
# As many logits each.
CLASSES = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
sweep = ("classes", {n: partial(_call, "", (1 << 28) // n, n) for n in CLASSES})


def _liger():
    liger = import_module("liger_kernel.ops")

    def cross_entropy(input, target):
        return liger.LigerCrossEntropyFunction.apply(input, target, None)[0]

    return Overwriting(cross_entropy)  # the gradient takes the place of the logits


def _quack():
    quack = import_module("quack.cross_entropy")

    def cross_entropy(input, target):
        return quack.cross_entropy(input, target)

    return cross_entropy


rivals = {"liger-kernel": _liger, "quack": _quack}
