"""Shapes and rivals of attention: FlashAttention's (16k tokens, 2048 hidden), and the features that rivals lack."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from ..ops.attention.attention import attention_reference
from ..registry import Sample
from .attention_rivals import rivals

__all__ = ["cpu_shapes", "reference", "rivals", "shapes", "sweep"]


def _made(kwargs, device, dtype):
    return {k: v(device, dtype) if callable(v) else v for k, v in kwargs.items()}


def dense(batch: int, heads: int, length: int, dim: int, heads_kv: int | None = None, **kwargs):
    """Queries, keys and values (batch, heads, length, dim), views of tensors that hold a token's heads together."""

    def make(device, dtype):
        def tensor(n):
            return torch.randn(batch, length, n, dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

        query, key, value = tensor(heads), tensor(heads_kv or heads), tensor(heads_kv or heads)
        return Sample("", (query, key, value), _made(kwargs, device, dtype))

    return make


def decoding(batch: int, heads: int, heads_kv: int, length: int, dim: int, **kwargs):
    """One new query, which alone takes a gradient, for each of ``batch`` sequences against ``length`` cached keys."""

    def make(device, dtype):
        query = torch.randn(batch, heads, 1, dim, device=device, dtype=dtype).requires_grad_()
        cache = torch.randn(2, batch, heads_kv, length, dim, device=device, dtype=dtype)
        return Sample("", (query, *cache.unbind()), dict(causal=True, **_made(kwargs, device, dtype)))

    return make


def slopes(heads: int):
    """What makes ALiBi's slopes, one a head."""
    return lambda device, dtype: torch.linspace(0.004, 0.7, heads, device=device, dtype=torch.float32)


def parameter(*shape: int):
    """What makes a tensor of ``shape`` that requires a gradient."""
    return lambda device, dtype: torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def packed(batch: int, length: int, heads: int, dim: int, heads_kv: int | None = None, **kwargs):
    """``batch`` sequences of one length in one tensor."""

    def make(device, dtype):
        starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * length

        def tensor(n):
            return torch.randn(batch * length, n, dim, device=device, dtype=dtype).requires_grad_()

        query, key, value = tensor(heads), tensor(heads_kv or heads), tensor(heads_kv or heads)
        return Sample(
            "", (query, key, value), dict(cu_seqlens_q=starts, cu_seqlens_k=starts, **_made(kwargs, device, dtype))
        )

    return make


shapes = {
    "d64 causal 2x32x8192": dense(2, 32, 8192, 64, causal=True),
    "d64 full 2x32x8192": dense(2, 32, 8192, 64),
    "d128 causal 2x16x8192": dense(2, 16, 8192, 128, causal=True),
    "d128 full 2x16x8192": dense(2, 16, 8192, 128),
    "d256 causal 2x8x8192": dense(2, 8, 8192, 256, causal=True),
    "d128 grouped causal 2x32/8x4096": dense(2, 32, 4096, 128, 8, causal=True),
    "d128 packed causal 8x2048": packed(8, 2048, 16, 128, causal=True),
    "d128 window 1024 soft cap": dense(2, 16, 8192, 128, causal=True, window=(1024, 0), softcap=50.0),
    "d64 sinks window 128": dense(2, 64, 4096, 64, 8, causal=True, window=(128, 0), sinks=parameter(64)),
    "d128 alibi": dense(2, 16, 4096, 128, causal=True, alibi_slopes=slopes(16)),
    "d64 bias": dense(4, 16, 1024, 64, bias=parameter(1, 16, 1024, 1024)),
    "d128 decode 1x32/8x32768": decoding(1, 32, 8, 32768, 128),
    "d64 decode 16x16x4096 window 1024": decoding(16, 16, 16, 4096, 64, window=(1024, 0)),
    "small d64 causal 1x12x128": dense(1, 12, 128, 64, causal=True),
    "d64 dropout": dense(4, 16, 2048, 64, causal=True, dropout_p=0.1),
}
cpu_shapes = {
    "d64 causal 1x12x1024": dense(1, 12, 1024, 64, causal=True),
    "d128 grouped window 256, sinks 1x16/4x512": dense(
        1, 16, 512, 128, 4, causal=True, window=(256, 0), sinks=parameter(16)
    ),
}

# 16k tokens and 2048 hidden, as in FlashAttention's own plots.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
sweep = ("sequence length", {n: dense(16384 // n, 16, n, 128, causal=True) for n in LENGTHS})


def reference(query, key, value, *, alibi_slopes=None, sinks=None, bias=None, dropout_p=0.0, **options):
    """The op's reference, one key head at a time and recomputed for the gradient: it holds all the scores of one."""
    if dropout_p:  # the mask is drawn for all heads at once
        options |= dict(alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, dropout_p=dropout_p)
        return attention_reference(query, key, value, **options)
    group = query.shape[1] // key.shape[1]
    outs = []
    for h in range(key.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        own = dict(
            alibi_slopes=None if alibi_slopes is None else alibi_slopes[..., heads],
            sinks=None if sinks is None else sinks[heads],
            bias=bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
        )
        tensors = query[:, heads], key[:, h : h + 1], value[:, h : h + 1]
        outs.append(checkpoint(attention_reference, *tensors, use_reentrant=False, **own, **options))
    return torch.cat(outs, 1)
