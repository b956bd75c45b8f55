"""Attention in bfloat16 on CPUs with matrix units (AMX), by the extension (csrc/cpu/attention_amx.cpp).

A block of 32 queries holds its scores in fp32 against all keys; the backward computes them again, keeps the softmax and
its gradient in bf16 for the products over the queries, and saves nothing but its inputs. Beside torch's fused attention
(one thread, 64 columns, causal): the backward takes 0.05 of its time at 64 tokens, 0.2 at 256 and 512, 0.3 at 1024 and
2048, 0.9 at 4096, where the two matrices no longer fit any cache; the forward 0.6, and 0.9 at 64 tokens.
"""

from __future__ import annotations

import math

import torch

from ... import extension
from ...backends import chosen_backend
from ..shared.autograd import apply, gradients
from .reference import reference

LONGEST = 2048
WIDEST = 256
# What a hidden key adds to its products with the queries; exact in bf16, beyond every product of what is not.
HIDDEN = 2.0**100


def amx_serves(q, k, v, mask, causal: bool) -> bool:
    """Whether this form takes the call: (B, H, S, D) in bf16 on CPU, causal or with padding hidden, not too long."""
    if not (q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16):
        return False
    if chosen_backend() == "eager" or not extension.has_matrix_units():
        return False
    if mask is not None:
        # A key that is hidden is hidden from all queries and heads; the mask takes one column more.
        keys = mask.dim() == 4 and mask.shape[0] in (1, q.shape[0]) and mask.shape[1:] == (1, 1, k.shape[2])
        if not keys or mask.dtype != torch.bool or causal or q.shape[-1] >= WIDEST:
            return False
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[-1] > WIDEST:
        return False
    if causal and q.shape[2] != k.shape[2]:
        return False
    return 0 < q.shape[2] <= LONGEST and 0 < k.shape[2] <= LONGEST and q.numel() > 0


def amx_exception(device_type: str) -> str | None:
    """What ``info`` says of it."""
    if device_type != "cpu" or chosen_backend() == "eager" or not extension.has_matrix_units():
        return None
    return f"bfloat16 with no mask but of padding up to {LONGEST} tokens: the extension, on AMX"


def _fresh(x):
    """As the extension allocates: heads of one token side by side in memory."""
    batch, heads, rows, columns = x.shape
    return x.new_empty(batch, rows, heads, columns).transpose(1, 2)


def _fwd_fake(q, k, v, scale, causal):
    return _fresh(q)


def _bwd_fake(dout, q, k, v, scale, causal):
    return _fresh(q), _fresh(k), _fresh(v)


_fwd = extension.operator("attention_amx_fwd", _fwd_fake)
_bwd = extension.operator("attention_amx_bwd", _bwd_fake)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, scale, causal):
        return _fwd(q, k, v, scale, causal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.causal = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 5

        def launch(inputs, outputs_grad, extras, needs):
            return _bwd(*outputs_grad, *inputs, ctx.scale, ctx.causal)

        def formula(q, k, v):
            right = 0 if ctx.causal else -1
            return reference(q, k, v, None, None, None, None, None, None, ctx.scale, 0.0, -1, right, False, 0.0)[0]

        return *gradients(launch, formula, ctx.saved_tensors, ctx.needs_input_grad[:3], (dout,)), None, None


def amx_attention(q, k, v, mask, scale: float, causal: bool):
    """(B, H, Sq, D) attention where :func:`amx_serves`; causal is for square scores.

    A mask of keys is one more column of the heads: 1 in the queries, in the keys 0 or what no score comes near.
    """
    scale = float(scale)
    if mask is None:
        return apply(_Attention, q, k, v, scale, causal)
    hidden = k.new_zeros(()).where(mask, math.copysign(HIDDEN, -scale)).transpose(2, 3)
    hidden = hidden.expand(*k.shape[:3], 1)
    q, v = torch.cat((q, q.new_ones(*q.shape[:3], 1)), -1), torch.cat((v, hidden.new_zeros(()).expand_as(hidden)), -1)
    out = apply(_Attention, q, torch.cat((k, hidden), -1), v, scale, causal)[..., :-1]
    # Where no key is left, none is higher than another.
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
