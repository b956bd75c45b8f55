"""What a Transformer is made of: rotary and relative positions, attention, MLP, the block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as fast
from ..functional import add_layer_norm, add_rms_norm, attention, geglu, rms_norm, rotary_embedding, swiglu
from .config import GATED, ModelConfig
from .embedding import make_norm

# What the MLP does between its layers, by the name of its activation: without a gate, and of gate and up side by side.
UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
GATED_PRODUCTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": swiglu, "geglu": geglu, "geglu_tanh": partial(geglu, approximate="tanh"),
}  # fmt: skip
_BETWEEN = {**UNGATED, **GATED_PRODUCTS}


def rotary_tables(length: int, head_dim: int, base: float, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2i / head_dim), each (length, head_dim / 2) in fp32 (Su et al. 2021, eq. 15)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def relative_bucket(distance: torch.Tensor, buckets: int, furthest: int, causal: bool) -> torch.Tensor:
    """The bucket of key position minus query position (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each. The others hold ranges that grow logarithmically up to ``furthest``.
    Without ``causal`` the upper half of all buckets is for keys after the query.
    """
    if causal:
        offset, distance = 0, (-distance).clamp(min=0)
    else:
        buckets //= 2
        offset, distance = (distance > 0) * buckets, distance.abs()
    single = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / single) / math.log(furthest / single)
    far = (single + (ratio * (buckets - single)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < single, distance, far)


@dataclass
class Context:
    """What the blocks of one pass share.

    ``causal``: hide later tokens. ``rotary``: cos and sin of each position. ``bias``: added to the scores, or boolean.
    ``sequences``: where packed sequences start, (sequences + 1,), and the longest's length. ``memory`` (B, S,
    hidden_size) and ``memory_mask`` (B, S), True for tokens: what cross-attention reads.
    """

    causal: bool
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: torch.Tensor | None = None
    sequences: tuple[torch.Tensor, int] | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    cache: Any = None  # a KVCache, or the RecurrentCache of blocks that keep one


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, T, H * D) as (B, H, T, D), packed (total, H * D) as (total, H, D): views, the attention takes any strides."""
    x = x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    return x.transpose(1, 2) if x.dim() == 4 else x


def _joined(x: torch.Tensor) -> torch.Tensor:
    return (x.transpose(1, 2) if x.dim() == 4 else x).flatten(-2)


def _rotated(query: torch.Tensor, key: torch.Tensor, tables):
    """Both, (B, H, T, D) or packed (total, H, D), turned by their positions' angles."""
    if query.dim() == 4:
        return rotary_embedding(query, key, *tables)
    return (x.transpose(0, 1) for x in rotary_embedding(query.transpose(0, 1), key.transpose(0, 1), *tables))


class Attention(nn.Module):
    """Self-attention; queries, keys and values from one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.split = [heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.qkv = fast.Linear(config.hidden_size, sum(self.split), bias=config.bias)
        self.out = fast.Linear(self.split[0], config.hidden_size, bias=config.bias)

    def forward(self, x: torch.Tensor, context: Context, layer: int) -> torch.Tensor:
        config = self.config
        query, key, value = (_heads(part, config.head_dim) for part in self.qkv(x).split(self.split, -1))
        if config.qk_norm:
            query, key = (rms_norm(t, (config.head_dim,), eps=config.norm_eps) for t in (query, key))
        if context.rotary is not None:
            query, key = _rotated(query, key, context.rotary)
        if context.cache is not None:
            key, value = context.cache.append(layer, key, value)
        packed: dict[str, Any] = {}
        if context.sequences is not None:
            starts, longest = context.sequences
            packed = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest)
        # Bottom-right causal: the last query sees every key, cached ones too.
        out = attention(
            query, key, value, causal=context.causal, bias=context.bias,
            scale=None if config.scale_attention else 1.0, **packed,
        )  # fmt: skip
        return self.out(_joined(out))


class CrossAttention(nn.Module):
    """Attention from a decoder's states to an encoder's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.query = fast.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.bias)
        self.key_value = fast.Linear(config.hidden_size, 2 * config.kv_heads * config.head_dim, bias=config.bias)
        self.out = fast.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)

    def forward(self, x: torch.Tensor, context: Context, layer: int) -> torch.Tensor:
        config, cache = self.config, context.cache
        held = None if cache is None else cache.memory.get(layer)
        if held is None:
            held = tuple(_heads(part, config.head_dim) for part in self.key_value(context.memory).chunk(2, -1))
            if cache is not None:
                cache.memory[layer] = held
        mask = None if context.memory_mask is None else context.memory_mask[:, None, None, :]
        scale = None if config.scale_attention else 1.0
        return self.out(_joined(attention(_heads(self.query(x), config.head_dim), *held, bias=mask, scale=scale)))


class MLP(nn.Module):
    """Two linear layers around a non-linearity, or three around a gate (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        wide = config.mlp_size * (2 if config.activation in GATED else 1)
        self.up = fast.Linear(config.hidden_size, wide, bias=config.bias)
        self.down = fast.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(_BETWEEN[self.activation](self.up(x)))


class Stream(NamedTuple):
    """The residual stream between two branches: ``branch`` + ``residual``, not added yet; ``residual`` None is 0.

    The next norm adds the two while it reads them.
    """

    branch: torch.Tensor
    residual: torch.Tensor | None = None

    def normed(self, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum)."""
        branch, residual = self
        if residual is None:
            return norm(branch), branch
        if isinstance(norm, fast.RMSNorm):
            return add_rms_norm(branch, residual, norm.normalized_shape, norm.weight, norm.eps)
        return add_layer_norm(branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def whole(self) -> torch.Tensor:
        """The sum."""
        return self.branch if self.residual is None else self.branch + self.residual


class Residual(nn.Module):
    """Branches around the residual stream, each with its norm before it or after the sum."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.post = config.norm_position == "post"
        self.dropout = nn.Dropout(config.dropout)

    def add(self, stream: Stream, norm: nn.Module, branch) -> Stream:
        """x + dropout(branch(norm(x))) of the stream's sum x, or norm(x + dropout(branch(x)))."""
        if not self.post:
            x, residual = stream.normed(norm)
            return Stream(self.dropout(branch(x)), residual)
        x = stream.branch
        normed, _ = Stream(self.dropout(branch(x)), x).normed(norm)
        return Stream(normed)


class Block(Residual):
    """Self-attention, with ``cross`` attention to an encoder's states, MLP."""

    def __init__(self, config: ModelConfig, cross: bool):
        super().__init__(config)
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        if cross:
            self.cross_norm = make_norm(config)
            self.cross_attention = CrossAttention(config)
        self.cross = cross
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def projections(self) -> list[nn.Linear]:
        """What writes into the residual stream."""
        return [self.attention.out, *([self.cross_attention.out] if self.cross else []), self.mlp.down]

    def forward(self, stream: Stream, context: Context, layer: int) -> Stream:
        stream = self.add(stream, self.attention_norm, lambda x: self.attention(x, context, layer))
        if self.cross:
            stream = self.add(stream, self.cross_norm, lambda x: self.cross_attention(x, context, layer))
        return self.add(stream, self.mlp_norm, self.mlp)
