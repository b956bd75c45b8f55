"""Shapes and rivals of linear_cross_entropy: (tokens, hidden size, vocabulary) of real models' heads."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F

from ..registry import Sample

SHAPES = {
    "GPT-2 8192x768x50304": (8192, 768, 50304),
    "Llama-3 8B 4096x4096x128256": (4096, 4096, 128256),
    "Llama-3 8B 16384x4096x128256": (16384, 4096, 128256),
    "Gemma-2 2B 8192x2304x256000": (8192, 2304, 256000),
    "small 128x768x4096": (128, 768, 4096),
}


def _call(name, rows, hidden, classes, device, dtype) -> Sample:
    x = torch.randn(rows, hidden, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(classes, hidden, device=device, dtype=dtype) / hidden**0.5).requires_grad_()
    options = {"softcap": 30.0} if name.startswith("Gemma") else {}
    return Sample(name, (x, w, torch.randint(0, classes, (rows,), device=device)), options)


shapes = {name: partial(_call, name, *shape) for name, shape in SHAPES.items()}
cpu_shapes = {"GPT-2 512x768x50304": partial(_call, "", 512, 768, 50304)}
sweep = ("tokens", {n: partial(_call, "", n, 768, 50304) for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)})


def _torch(chunked: bool):
    """torch's own: all the logits, or chunks that compute the gradient ahead."""

    def setup():
        if not hasattr(F, "linear_cross_entropy"):
            raise ModuleNotFoundError("torch >= 2.13", name="torch >= 2.13")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def linear_cross_entropy(input, linear_weight, target, *, softcap=None):
            _refuse_softcap(softcap)
            return F.linear_cross_entropy(input, linear_weight, target, options=options)

        return linear_cross_entropy

    return setup


def _refuse_softcap(softcap):
    if softcap is not None:
        raise NotImplementedError("does not take softcap")


def _liger():
    liger = import_module("liger_kernel.transformers.functional")

    def linear_cross_entropy(input, linear_weight, target, *, softcap=None):
        return liger.liger_fused_linear_cross_entropy(
            input, linear_weight, target, softcap=softcap, accum_dtype=torch.float32
        )

    return linear_cross_entropy


def _quack():
    quack = import_module("quack.linear_cross_entropy")

    def linear_cross_entropy(input, linear_weight, target, *, softcap=None):
        _refuse_softcap(softcap)
        return quack.chunked_linear_cross_entropy(input, linear_weight, target)

    return linear_cross_entropy


def _cut():
    package = import_module("cut_cross_entropy")

    def linear_cross_entropy(input, linear_weight, target, *, softcap=None):
        # Its default leaves small gradients out.
        return package.linear_cross_entropy(input, linear_weight, target, softcap=softcap, filter_eps=None)

    return linear_cross_entropy


rivals = {
    "torch": _torch(chunked=False),
    "torch chunked": _torch(chunked=True),
    "liger-kernel": _liger,
    "quack": _quack,
    "cut-cross-entropy": _cut,
}
