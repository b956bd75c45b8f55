"""Keys and values of the tokens that a decoder has seen, so that the next one costs one step."""

from __future__ import annotations

import torch

from .config import TransformerConfig


class KVCache:
    """Room for the keys and values of ``batch_size`` sequences, (B, kv_heads, context_length, head_dim) per layer.

    ``length`` is the number of tokens held. The model moves it on after its last layer; setting it back drops
    tokens from the end.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device):
        shape = (2, config.num_layers, batch_size, config.kv_heads, config.context_length, config.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, kv_heads, T, head_dim) after the tokens held; returns all keys and values up to there."""
        if key.shape[0] != self.keys.shape[1]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} sequences, got {key.shape[0]}")
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end].to(key.dtype), self.values[layer, :, :, :end].to(value.dtype)
