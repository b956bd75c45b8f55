"""The embedding layer that every encoder and decoder starts with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .. import nn as fast
from ..functional import embedding_sum
from .config import ModelConfig

# The deviation of new weights (Radford et al. 2019, GPT-2's code).
INITIAL_STD = 0.02


def make_norm(config: ModelConfig) -> nn.Module:
    """The configuration's norm over hidden_size."""
    if config.norm == "rms":
        return fast.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return fast.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def sinusoids(length: int, size: int) -> torch.Tensor:
    """(length, size) fp32: sin(position / 10000^(2i / size)) in the first half, cos in the second.

    Vaswani et al. 2017, 3.5, in the order that tensor2tensor and Marian keep them.
    """
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Embedded(nn.Module):
    """Base of encoders and decoders: token, position and segment embeddings in one pass, their norm, dropout.

    ``positions``: whether the configuration's learned or sinusoidal positions are added; a recurrent model needs none.
    """

    # What a subclass adds.
    blocks: nn.ModuleList
    norm: nn.Module
    # Only with such positions.
    position_table: torch.Tensor

    def __init__(self, config: ModelConfig, positions: bool):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.token_embedding = fast.Embedding(config.vocab_size, config.hidden_size)
        self.positions = config.positions if positions else "none"
        if self.positions == "learned":
            self.position_embedding = fast.Embedding(config.context_length, config.hidden_size)
        elif self.positions == "sinusoidal":
            table = sinusoids(config.context_length, config.hidden_size)
            self.register_buffer("position_table", table, persistent=False)
        if config.segments:
            self.segment_embedding = fast.Embedding(config.segments, config.hidden_size)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def check_tokens(self, tokens: torch.Tensor, start: int = 0) -> None:
        """Refuse what is not (batch, length) of integers, or reaches past the context."""
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be (batch, length) of int64 or int32, got {list(tokens.shape)} of {tokens.dtype}"
            )
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"tokens reach position {end}, past context_length {self.config.context_length} "
                f"({start} cached and {tokens.shape[1]} new)"
            )

    def embed(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., hidden_size) for ``tokens`` (...); ``positions`` None: from 0 along the last dimension."""
        indices: list[torch.Tensor | None] = [tokens]
        weights: list[torch.Tensor] = [self.token_embedding.weight]
        if self.positions in ("learned", "sinusoidal"):
            # None: positions from 0, whose gradient needs no sort.
            indices.append(positions)
            learned = self.positions == "learned"
            weights.append(self.position_embedding.weight if learned else self.position_table)
        if self.config.segments:
            indices.append(torch.zeros_like(tokens) if segments is None else segments)
            weights.append(self.segment_embedding.weight)
        scale = math.sqrt(self.config.hidden_size) if self.config.scale_embeddings else 1.0
        if len(weights) == 1 and scale == 1.0:
            x = self.token_embedding(tokens)
        else:
            x = embedding_sum(indices, weights, scale=[scale, *[1.0] * (len(weights) - 1)])
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual stream by 1 / sqrt(branches) of it, or zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)
        # Scaled by sqrt(hidden_size), embeddings of this deviation come out as 1.
        if self.config.scale_embeddings:
            nn.init.normal_(self.token_embedding.weight, std=self.config.hidden_size**-0.5)
        blocks: list[Any] = list(self.blocks)
        projections = [p for block in blocks for p in block.projections()]
        for projection in projections:
            if self.config.zero_init:
                nn.init.zeros_(projection.weight)
            else:
                nn.init.normal_(projection.weight, std=INITIAL_STD / math.sqrt(len(projections)))
