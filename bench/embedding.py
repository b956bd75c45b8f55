"""Shapes of embedding: ids as a language has them."""

from __future__ import annotations

from functools import partial

import torch

from ..registry import Sample

# (tokens, rows of the table, columns); the most telling first.
_CALLS = {
    "GPT-2 32k tokens, 50304x768": (1 << 15, 50304, 768),
    "Llama-3 8B 32k tokens, 128256x4096": (1 << 15, 128256, 4096),
    "Llama-3 8B 256k tokens, 128256x4096": (1 << 18, 128256, 4096),
    "one token, 50304x768": (1, 50304, 768),
}


def zipf_ids(tokens: int, rows: int, device) -> torch.Tensor:
    """Ids whose frequency falls as 1 / rank, as words' do (Zipf 1949); id 0 is the most frequent."""
    # The inverse of the cumulative distribution of a density 1 / x on [1, rows + 1).
    ids = torch.rand(tokens, device=device).mul(torch.tensor(rows + 1.0).log().item()).exp().sub(1)
    return ids.long().clamp(0, rows - 1)


def _call(name, tokens, rows, columns, device, dtype) -> Sample:
    weight = torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_()
    return Sample(name, (zipf_ids(tokens, rows, device), weight))


shapes = {name: partial(_call, name, *call) for name, call in _CALLS.items()}
cpu_shapes = {"GPT-2 4k tokens, 50304x768": partial(_call, "", 1 << 12, 50304, 768)}
