"""PyTorch's fused attention for 16-bit tensors on CPUs without 16-bit products: some heads at a time, widened to fp32.

Times on one core of an AMD EPYC held to AVX2, and those of PyTorch's kernel on the 16-bit tensors: causal, 12 heads,
512 tokens, forward and backward in bf16 34 ms and 160; one query against 512 keys 0.11 ms and 0.52 (0.83 in fp16).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import apply, gradients, unwrapped
from .call import AttentionCall, Edge, new_by_token
from .reference import reference

# Elements of query, key and value that are widened at once: 2 MB in fp32. A guess.
BLOCK = 2**19

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Planes(NamedTuple):
    """Some heads of some batches. ``heads`` are those of the query, ``heads_kv`` the key heads that they read."""

    batch: slice
    heads: slice
    heads_kv: slice


def planes(q: torch.Tensor, k: torch.Tensor) -> Iterator[Planes]:
    """All heads, BLOCK elements at a time, with at least one head for each thread: the backward splits by heads."""
    batch, heads_kv, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    of_one = group * q.shape[2] * q.shape[3] + 2 * k.shape[2] * k.shape[3]
    count = max(BLOCK // of_one, -(-torch.get_num_threads() // group), 1)
    n_heads, n_batch = min(heads_kv, count), max(1, count // heads_kv)
    for b in range(0, batch, n_batch):
        for h in range(0, heads_kv, n_heads):
            stop = min(h + n_heads, heads_kv)
            yield Planes(slice(b, b + n_batch), slice(h * group, stop * group), slice(h, stop))


def _wide(x: torch.Tensor) -> torch.Tensor:
    # PyTorch's kernel reads columns side by side, whatever the strides.
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def _widened(q, k, v, mask, at: Planes) -> tuple[torch.Tensor | None, ...]:
    """The planes ``at`` in fp32, and the mask as PyTorch adds it."""
    q, k, v = _wide(q[at.batch, at.heads]), _wide(k[at.batch, at.heads_kv]), _wide(v[at.batch, at.heads_kv])
    if mask is not None:
        mask = mask[at.batch] if mask.shape[0] > 1 else mask
        mask = mask[:, at.heads] if mask.shape[1] > 1 else mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float()
    return q, k, v, mask


def _fwd_fake(q, k, v, mask, scale, causal):
    return new_by_token(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32).transpose(1, 2)


@define(
    "attention_widened_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> (Tensor, Tensor)",
    _fwd_fake,
)
def _fwd(q, k, v, mask, scale, causal):
    out, lse = _fwd_fake(q, k, v, mask, scale, causal)
    with torch.autocast("cpu", enabled=False):
        for at in planes(q, k):
            *wide, added = _widened(q, k, v, mask, at)
            where = at.batch, at.heads
            out[where], lse[where] = _flash(*wide, 0.0, causal, attn_mask=added, scale=scale)
    return out, lse


def _bwd_fake(dout, q, k, v, *others):
    return new_by_token(q), new_by_token(k), new_by_token(v)


@define(
    "attention_widened_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    "float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _bwd(dout, q, k, v, *others):
    mask, out, lse, scale, causal = others
    grads = _bwd_fake(dout, q, k, v)
    with torch.autocast("cpu", enabled=False):
        for at in planes(q, k):
            *wide, added = _widened(q, k, v, mask, at)
            where, where_kv = (at.batch, at.heads), (at.batch, at.heads_kv)
            tensors = _wide(dout[where]), *wide, _wide(out[where]), lse[where]
            found = _flash_backward(*tensors, 0.0, causal, attn_mask=added, scale=scale)
            for grad, place, some in zip(grads, (where, where_kv, where_kv), found, strict=True):
                grad[place] = some
    return grads


class _WidenedAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, mask, edge):
        return _fwd(q, k, v, mask, *edge)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.edge = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, dout, _dlse):
        if dout is None:
            return (None,) * 5
        q, k, v, *extras = ctx.saved_tensors

        def launch(inputs, outputs_grad, extras, needs):
            return _bwd(*outputs_grad, *inputs, *extras, *ctx.edge)

        def formula(q, k, v):
            return reference(ctx.edge.call_of(q, k, v, *unwrapped(extras[:1])))[0]

        grads = gradients(launch, formula, (q, k, v), ctx.needs_input_grad[:3], (dout,), extras)
        return *grads, None, None


def widened_attention(call: AttentionCall) -> torch.Tensor:
    """(B, H, Sq, D) attention of 16-bit tensors with a causal edge or a mask without a gradient."""
    out, _ = apply(_WidenedAttention, call.q, call.k, call.v, call.bias, Edge(call.scale, call.causal))
    return out
