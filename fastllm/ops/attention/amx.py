"""Attention in bfloat16 on CPUs with matrix units (AMX), by the extension (csrc/cpu/attention_amx.cpp).

A block of 32 queries holds its scores against all keys in fp32. The backward computes them again and keeps the softmax
and its gradient in bf16 for the products over the queries. Nothing but the inputs is saved for it. Its time over that
of torch's fused attention (one thread, 64 columns, causal) is 0.05 at 64 tokens, 0.2 at 256 and 512, 0.3 at 1024 and
2048, and 0.9 at 4096, where the two matrices no longer fit any cache. The forward's is 0.6, and 0.9 at 64 tokens.
"""

from __future__ import annotations

import math

import torch

from ... import extension
from ...backends import operators_alone
from ..shared.autograd import apply, gradients
from .call import AttentionCall, Edge, new_by_token
from .reference import reference

MAX_TOKENS = 2048
MAX_DIM = 256
# What a hidden key adds to its products with the queries: exact in bf16, and larger than any product of a seen key.
HIDDEN = 2.0**100
# Scales for which HIDDEN stays larger than any product, and finite in units of log2.
MIN_SCALE, MAX_SCALE = 2.0**-64, 2.0**20


def amx_refuses(call: AttentionCall) -> str | None:
    """Why the matrix units do not serve a call that has no feature but a causal edge or a mask; None if they do."""
    q, k, v, mask = call.q, call.k, call.v, call.bias
    if q.dtype != torch.bfloat16 or not q.is_cpu:
        return "they take bfloat16 on CPUs"
    if not extension.has_matrix_units():
        return "this CPU has none, or the extension was not built"
    if operators_alone() or q.layout != torch.strided:
        return "the extension takes dense tensors outside torch.func's transforms, torch.export and torch.jit.trace"
    causal = call.causal
    if mask is not None:
        if mask.dtype != torch.bool or causal:
            return "a mask must be boolean, without a causal edge"
        if mask.shape[0] not in (1, q.shape[0]) or mask.shape[1:] != (1, 1, k.shape[2]):
            return "a mask must hide a key from all queries and heads"
        if q.shape[-1] >= MAX_DIM:
            return f"with a mask the head dim must be below {MAX_DIM}: the mask is one more column"
        if not MIN_SCALE <= abs(call.scale) <= MAX_SCALE:
            return f"with a mask the scale must lie between {MIN_SCALE:.1g} and {MAX_SCALE:.1g}"
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[-1] > MAX_DIM:
        return f"query, key and value must agree in batch, heads and head dim, the last at most {MAX_DIM}"
    if causal and not call.square:
        return "a causal edge is for square scores"
    if not (0 < q.shape[2] <= MAX_TOKENS and 0 < k.shape[2] <= MAX_TOKENS and q.numel() > 0):
        return f"they take 1 to {MAX_TOKENS} tokens"
    return None


def _fwd_fake(q, k, v, scale, causal):
    return new_by_token(q)


def _bwd_fake(dout, q, k, v, scale, causal):
    return new_by_token(q), new_by_token(k), new_by_token(v)


_fwd = extension.operator("attention_amx_fwd", _fwd_fake)
_bwd = extension.operator("attention_amx_bwd", _bwd_fake)


class _AmxAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, edge):
        return _fwd(q, k, v, *edge)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.edge = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 4

        def launch(inputs, outputs_grad, extras, needs):
            return _bwd(*outputs_grad, *inputs, *ctx.edge)

        def formula(q, k, v):
            return reference(ctx.edge.call_of(q, k, v))[0]

        return *gradients(launch, formula, ctx.saved_tensors, ctx.needs_input_grad[:3], (dout,)), None


def amx_attention(call: AttentionCall) -> torch.Tensor:
    """(B, H, Sq, D) attention of a call that :func:`amx_refuses` has no reason against.

    A mask of keys becomes one more column of the heads: 1 in the queries, and 0 or HIDDEN in the keys.
    """
    q, k, v = call.q, call.k, call.v
    edge = Edge(call.scale, call.causal)
    if call.bias is None:
        return apply(_AmxAttention, q, k, v, edge)
    hidden = k.new_zeros(()).where(call.bias, math.copysign(HIDDEN, -edge.scale)).transpose(2, 3)
    hidden = hidden.expand(*k.shape[:3], 1)
    q, v = torch.cat((q, q.new_ones(*q.shape[:3], 1)), -1), torch.cat((v, hidden.new_zeros(()).expand_as(hidden)), -1)
    out = apply(_AmxAttention, q, torch.cat((k, hidden), -1), v, edge)[..., :-1]
    # Where all keys are hidden, all have the same score: the softmax would see them.
    return out.masked_fill(~call.bias.any(-1, keepdim=True), 0.0)
