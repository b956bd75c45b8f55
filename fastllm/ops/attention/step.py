"""Attention of one query to all keys on a CPU, by the extension (csrc/cpu/attention_step.cpp), without a gradient.

For a decoder's step. Keys and values are read once, also where several heads of queries share them, and stay in their
dtype in memory; products and sums are in float32.

Processor time at AVX2 on one busy core of an AMD EPYC, one query of 8 heads of 64, by scaled_dot_product_attention of
PyTorch and by this one with its choices, us: in bfloat16 16 keys 15 and 18, 64 keys 46 and 25, 1024 keys 824 and 148;
in float32 16 keys 5 and 17, 256 keys 25 and 33, 1024 keys 106 and 115.
"""

from __future__ import annotations

import torch

from ... import extension
from ...backends import operators_alone
from .call import AttentionCall

_NARROW_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def _fake(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


# (q (B, H, 1, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), mask (B, H, 1, Sk) boolean or float32, scale) -> (B, H, 1, Dv)
attention_step = extension.operator("attention_step", _fake)


def takes_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the extension serves one query of each head: without a gradient, where it has vector instructions."""
    if not (q.shape[-2] == 1 and q.is_cpu and q.dim() == 4 and q.dtype in _NARROW_OR_FLOAT):
        return False
    if extension.cpu_level() == "baseline" or q.layout != torch.strided or k.shape[1] != v.shape[1]:
        return False
    grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (mask is not None and mask.requires_grad)
    )
    return not grad and not operators_alone()


def step_attention(call: AttentionCall) -> torch.Tensor:
    """(B, H, 1, Dv) attention of a call that :func:`takes_step`, with nothing but a mask."""
    mask = call.bias
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(*call.q.shape[:3], call.k.shape[2])
    return attention_step(call.q, call.k, call.v, mask, call.scale)
