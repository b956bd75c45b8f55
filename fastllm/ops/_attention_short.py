"""Training attention over short sequences in bfloat16 on CPUs with matrix units (AMX).

torch's fused CPU attention multiplies small blocks, far from what AMX can do. Whole planes of scores by batched
products, recomputed in the backward, take 0.27 of its backward's time at 64 tokens, 0.34 at 128, 0.78 at 256 and 1.05
at 512 (384 to 768 heads of 64, one thread of a CPU with AMX). The scores are fp32, the other products bf16: bf16 scores
would give 0.74 at 256, but logits of 16 and more would lose their last digits. The forward is torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import define
from ._attention_reference import reference
from ._autograd import gradients

LONGEST = 256
# Scores of a chunk of planes: 2 MB in fp32, a core's L2.
CHUNK = 2**19


def _has_matrix_units() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return check is not None and check()


_MATRIX_UNITS = _has_matrix_units()


def short_serves(q, k, v, mask, causal: bool) -> bool:
    """Whether this form is the faster one: (B, H, S, D) in bf16 on CPU, to be differentiated, nothing but causal."""
    if not (_MATRIX_UNITS and q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None):
        return False
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return False
    if q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1] or (causal and q.shape[2] != k.shape[2]):
        return False
    return 0 < q.shape[2] <= LONGEST and 0 < k.shape[2] <= LONGEST and q.numel() > 0


def _fake(dout, q, k, v, scale, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@define(
    "attention_short_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, float scale, bool causal)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
)
def _short_bwd(dout, q, k, v, scale, causal):
    grads = _fake(dout, q, k, v, scale, causal)
    dq, dk, dv = (x.flatten(0, 1) for x in grads)
    rows, cols = q.shape[2], k.shape[2]
    edge = torch.zeros(rows, cols)
    if causal:
        edge.masked_fill_(torch.ones(rows, cols, dtype=torch.bool).triu_(1), -torch.inf)
    # Adjacent planes: batched products copy any other layout on every call.
    dout, q, k, v = (x.contiguous().flatten(0, 1) for x in (dout, q, k, v))
    step = max(1, CHUNK // (rows * cols))
    for start in range(0, q.shape[0], step):
        at = slice(start, start + step)
        t = torch.baddbmm(edge, q[at].float(), k[at].float().transpose(1, 2), alpha=scale)
        p = torch.softmax(t, -1, out=t).to(q.dtype)
        torch.bmm(p.transpose(1, 2), dout[at], out=dv[at])
        dp = torch.bmm(dout[at], v[at].transpose(1, 2))
        dt = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
        torch.bmm(dt, k[at], out=dq[at])
        torch.bmm(dt.transpose(1, 2), q[at], out=dk[at])
    return grads


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, scale, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

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
            return _short_bwd(*outputs_grad, *inputs, ctx.scale, ctx.causal)

        def formula(q, k, v):
            right = 0 if ctx.causal else -1
            return reference(q, k, v, None, None, None, None, None, None, ctx.scale, 0.0, -1, right, False, 0.0)[0]

        return *gradients(launch, formula, ctx.saved_tensors, ctx.needs_input_grad[:3], (dout,)), None, None


def short_attention(q, k, v, scale: float, causal: bool):
    """(B, H, Sq, D) attention where :func:`short_serves`; causal is for square scores."""
    return _Short.apply(q, k, v, scale, causal)
