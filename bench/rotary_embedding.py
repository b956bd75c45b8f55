"""Shapes and rivals of rotary_embedding: queries and keys of real models, as views of their projections."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch

from ..registry import Sample
from .cases import Overwriting


class RotaryShape(NamedTuple):
    batch: int
    length: int
    heads: int
    key_heads: int
    width: int  # features of a head
    rotated: int  # of them


SHAPES = {
    "Llama-3 8B 8192x(32+8)x128": RotaryShape(1, 8192, 32, 8, 128, 128),
    "GPT-NeoX 20B 4x2048x(64+64)x96 of which 24": RotaryShape(4, 2048, 64, 64, 96, 24),
    "one token of 64 sequences x(32+8)x128": RotaryShape(64, 1, 32, 8, 128, 128),
}


def _call(shape: RotaryShape, interleaved, device, dtype) -> Sample:
    heads = (shape.heads, shape.key_heads, shape.key_heads)
    packed = torch.randn(shape.batch, shape.length, sum(heads), shape.width, device=device, dtype=dtype)
    query, key, _ = (t.transpose(1, 2) for t in packed.requires_grad_().split(heads, 2))
    angles = torch.rand(shape.length, shape.rotated // 2, device=device)
    return Sample("", (query, key, angles.cos(), angles.sin()), {"interleaved": True} if interleaved else {})


shapes = {
    f"{name}{' interleaved' if interleaved else ''}": partial(_call, shape, interleaved)
    for interleaved in (False, True)
    for name, shape in SHAPES.items()
}

cpu_shapes = {"Llama-3 8B 256x(32+8)x128": partial(_call, RotaryShape(1, 256, 32, 8, 128, 128), False)}


def _liger():
    liger = import_module("liger_kernel.ops")

    def rotary_embedding(query, key, cos, sin, *, interleaved=False):
        if interleaved:
            raise NotImplementedError("does not take interleaved pairs")
        return liger.LigerRopeFunction.apply(query, key, cos, sin, None, 1, 2 * cos.shape[-1])

    return Overwriting(rotary_embedding)


def _quack():
    quack = import_module("quack.rotary")

    def rotary_embedding(query, key, cos, sin, *, interleaved=False):
        turned = (quack.apply_rotary_emb(t.transpose(1, 2), cos, sin, interleaved) for t in (query, key))
        return tuple(t.transpose(1, 2) for t in turned)

    return rotary_embedding


rivals = {"liger-kernel": _liger, "quack": _quack}
