"""Calls of attention for the generic tests, and its least cost."""

from __future__ import annotations

import torch

from ...registry import Cost, Sample


def attention_samples(device, dtype):
    """Shapes, layouts and feature sets that have broken attentions elsewhere; floating leaves require grad."""

    def make(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def qkv(batch, heads, rows, cols, dim, *, heads_kv=None, dim_v=None):
        heads_kv = heads_kv or heads
        return (
            make(batch, heads, rows, dim),
            make(batch, heads_kv, cols, dim),
            make(batch, heads_kv, cols, dim_v or dim),
        )

    def slopes(heads):
        return torch.linspace(0.05, 0.4, heads, device=device)

    def cu(*lengths):
        return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)

    yield Sample("full", qkv(2, 2, 37, 37, 24), {})
    yield Sample("causal", qkv(1, 2, 150, 150, 16), dict(causal=True))
    yield Sample("grouped_lse", qkv(1, 6, 9, 33, 20, heads_kv=2, dim_v=12), dict(causal=True, return_lse=True))
    yield Sample("empty_rows", qkv(1, 1, 21, 13, 8), dict(causal=True, return_lse=True))
    yield Sample(
        "everything",
        qkv(2, 4, 19, 35, 12, heads_kv=2),
        dict(
            causal=True, window=(9, 0), softcap=5.0, alibi_slopes=slopes(4), sinks=make(4), bias=make(2, 1, 19, 35),
            return_lse=True,
        ),
    )  # fmt: skip
    yield Sample(
        "packed",
        (make(30, 2, 16), make(41, 1, 16), make(41, 1, 16)),
        dict(causal=True, cu_seqlens_q=cu(7, 0, 12, 9), cu_seqlens_k=cu(7, 3, 22, 9), sinks=make(2)),
    )
    yield Sample("boolean_mask", qkv(1, 2, 18, 22, 8), dict(bias=torch.rand(1, 1, 18, 22, device=device) < 0.5))
    yield Sample("bias_of_keys", qkv(2, 2, 17, 23, 8), dict(bias=make(2, 1, 1, 23)))
    # Packed query, key and value in one tensor, heads inside: strided slices, the last dimension reversed in order.
    whole = torch.randn(1, 25, 3, 2, 16, device=device).to(dtype).permute(0, 3, 1, 2, 4)
    yield Sample("strided", tuple(whole[:, :, :, i].detach().requires_grad_() for i in range(3)), dict(window=(4, 3)))
    columns = tuple(make(1, 2, 16, 26).transpose(2, 3) for _ in range(3))
    yield Sample("columns", columns, dict(scale=0.5))
    yield Sample("expanded_keys", (make(2, 2, 10, 8), *(make(1, 2, 12, 8).expand(2, 2, 12, 8) for _ in "kv")), {})
    yield Sample("one_token", qkv(3, 4, 1, 40, 32, heads_kv=2), dict(causal=True))
    yield Sample("no_keys", qkv(1, 2, 5, 0, 8), dict(return_lse=True))
    yield Sample("no_queries", qkv(1, 2, 0, 5, 8), dict(return_lse=True))
    yield Sample("large_logits", qkv(1, 1, 24, 24, 16), dict(scale=4.0))
    yield Sample("negative_scale", qkv(1, 1, 10, 11, 8), dict(scale=-0.5))


def attention_examples(device):
    """The samples that ``fastllm info`` asks about: the backend and the form differ between them."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        query, key, value = torch.zeros(3, 1, 2, 512, 64, dtype=dtype, device=device)
        padding = torch.ones(1, 1, 1, 512, dtype=torch.bool, device=device)
        yield Sample(f"{name} causal", (query, key, value), dict(causal=True))
        yield Sample(f"{name} padded", (query, key, value), dict(bias=padding))
        yield Sample(f"{name} windowed", (query, key, value), dict(causal=True, window=(64, 0)))
    query, key, value = torch.zeros(3, 1, 2, 512, 64, device=device)
    yield Sample("float32 with a negative scale", (query, key, value), dict(causal=True, scale=-1.0))


def attention_cost(query, key, value, *, causal=False, window=None, bias=None, cu_seqlens_q=None, **_) -> Cost:
    """Every input and output once; 2 products of 2 flops for each visible pair and dim, 2.5 times that backward.

    Pairs are those the mask leaves, by the mean length where sequences are packed.
    """
    packed = cu_seqlens_q is not None
    sequences = max(cu_seqlens_q.numel() - 1, 1) if packed else query.shape[0]
    heads = query.shape[1]
    rows, cols = (x.shape[0] // sequences if packed else x.shape[2] for x in (query, key))
    offset = cols - rows
    left, right = (-1 if side is None else side for side in window or (-1, -1))
    right = 0 if causal else right
    pairs = 0
    for i in range(rows):
        low = max(0, i + offset - left) if left >= 0 else 0
        high = min(cols, i + offset + right + 1) if right >= 0 else cols
        pairs += max(0, high - low)
    size = query.element_size()
    out = query.numel() // max(query.shape[-1], 1) * value.shape[-1]
    inputs = query.numel() + key.numel() + value.numel()
    extra = bias.numel() * bias.element_size() if bias is not None else 0
    flops = 2 * sequences * heads * pairs * (query.shape[-1] + value.shape[-1])
    return Cost(
        (inputs + out) * size + extra, 2 * (inputs + out) * size + 2 * extra, flops, flops * 5 // 2
    )  # fmt: skip
