"""bench/attention_rivals.py: what other attentions are given."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from fastllm.bench.attention_rivals import rivals


@pytest.mark.parametrize("name", ["varlen_attn", "flash-attn 2", "flash-attn 3"])
def test_packed_sequences_come_with_the_longest_of_their_own(monkeypatch, name):
    """A freed ``cu_seqlens`` leaves its address to the next one, whose sequences may be longer."""
    longest = []

    def attention(query, key, value, starts_q, starts_k, longest_q, longest_k, **options):
        longest.append((longest_q, longest_k))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(flash_attn_varlen_func=attention))
    rival = rivals[name]()
    tensors = [torch.zeros(64, 2, 8) for _ in range(3)]
    lengths = [(n, 65 - n) for n in range(1, 65)]
    for queries, keys in lengths:
        starts = {f"cu_seqlens_{side}": torch.tensor([0, n]) for side, n in (("q", queries), ("k", keys))}
        rival(*tensors, **starts)
    assert longest == lengths
