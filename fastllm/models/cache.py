"""Keys and values of the tokens that a decoder has seen, so that the next one costs one step."""

from __future__ import annotations

import torch

from .config import TransformerConfig


class KVCache:
    """Room for the keys and values of ``batch_size`` sequences, (B, kv_heads, context_length, head_dim) per layer.

    ``length`` is the number of tokens held. The model moves it on after its last layer; setting it back drops
    tokens from the end. What it holds has no gradient, so it serves only without one.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device):
        shape = (2, config.num_layers, batch_size, config.kv_heads, config.context_length, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, kv_heads, T, head_dim) after the tokens held; returns all keys and values up to there.

        Raises:
            ValueError: another number of sequences than the cache was made for.
            RuntimeError: ``key`` or ``value`` requires a gradient, which would be lost.
        """
        if key.requires_grad or value.requires_grad:
            raise RuntimeError("a key/value cache keeps no gradient: call the model under torch.no_grad()")
        if key.shape[0] != self._store.shape[2]:
            raise ValueError(f"the cache was made for {self._store.shape[2]} sequences, got {key.shape[0]}")
        end = self.length + key.shape[2]
        for held, new in zip(self._store, (key, value), strict=True):
            held[layer, :, :, self.length : end] = new
        keys, values = self._store[:, layer, :, :, :end].to(key.dtype)
        return keys, values
