"""A decoder-only Transformer on fastllm's ops: GPT-2's shape, Llama's, and what lies between."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import nn as fast
from ..functional import attention, cross_entropy, embedding_sum, rms_norm
from .cache import KVCache
from .config import TransformerConfig
from .pretrained import Pretrained

# Logits up to which a step holds them all: on a CPU with matrix units, forward and backward of a step took 1.05 to 1.07
# of the time in chunks at 0.4 and 2 million logits, and 0.89 at 34 million (medians of 7 pairs, bf16).
WHOLE_LOGITS = 2**24


def rotary_tables(length: int, head_dim: int, base: float, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2i / head_dim), each (length, head_dim / 2) in fp32 (Su et al. 2021, eq. 15)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of ``x`` (..., T, D) by its position's angle; cos, sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return fast.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return fast.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values from one product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.split = [heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.hidden_size, sum(self.split), bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, rotary, cache: KVCache | None, layer: int):
        batch, length, _ = x.shape
        config = self.config
        # (B, H, T, D) views of one (B, T, ...) product: the attention takes any strides.
        query, key, value = (
            part.view(batch, length, -1, config.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.split, -1)
        )
        if config.qk_norm:
            query, key = (rms_norm(t, (config.head_dim,), eps=config.norm_eps) for t in (query, key))
        if rotary is not None:
            query, key = (rotate(t, *rotary) for t in (query, key))
        if cache is not None:
            key, value = cache.append(layer, key, value)
        # Bottom-right causal: the last query sees every key, cached ones too.
        out = attention(query, key, value, causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Two linear layers around a non-linearity, or three around a gate (swiglu, Shazeer 2020)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.activation
        wide = config.mlp_size * (2 if config.activation == "swiglu" else 1)
        self.up = nn.Linear(config.hidden_size, wide, bias=config.bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.activation == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, cache: KVCache | None, layer: int):
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, cache, layer))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(Pretrained, nn.Module):
    """A decoder: tokens in, logits of the next token out.

    ``config`` is a :class:`TransformerConfig`. Set ``checkpoint_activations = True`` to keep only each block's input
    for the backward and to compute the rest again.
    """

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.token_embedding = fast.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embedding = fast.Embedding(config.context_length, config.hidden_size)
        else:
            cos, sin = rotary_tables(config.context_length, config.head_dim, config.rotary_base)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.embedding_norm = _norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.head = fast.LinearCrossEntropyHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """GPT-2's initialisation: N(0, 0.02), projections into the residual stream by 1 / sqrt(2 layers) of it."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.down):
                if self.config.zero_init:
                    nn.init.zeros_(projection.weight)
                else:
                    nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.num_layers))

    def hidden(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The normed last hidden states (B, T, hidden_size); arguments as :meth:`forward`'s."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be (batch, length) of int64 or int32, got {list(tokens.shape)} of {tokens.dtype}"
            )
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"tokens reach position {end}, past context_length {self.config.context_length} "
                f"({start} cached and {tokens.shape[1]} new)"
            )
        if self.config.positions == "learned":
            # None: positions from 0, whose gradient needs no sort.
            positions = None if start == 0 else torch.arange(start, end, device=tokens.device)
            x = embedding_sum((tokens, positions), (self.token_embedding.weight, self.position_embedding.weight))
            rotary = None
        else:
            x = self.token_embedding(tokens)
            rotary = (self.rotary_cos[start:end], self.rotary_sin[start:end])
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, cache, layer, use_reentrant=False)
            else:
                x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits (B, T, vocab_size) of the token after each of ``tokens``.

        Args:
            tokens: (B, T), int64 or int32.
            cache: from :meth:`new_cache`. Keys and values of ``tokens`` are added to it, and the tokens are taken to
                follow those that it holds.

        Raises:
            ValueError: tokens are of another shape or dtype, or reach past context_length.
            IndexError: a token is not in the vocabulary (on CPU).
        """
        return self.head(self.hidden(tokens, cache))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats (fp32 scalar) of ``targets`` (B, T) given ``tokens``; target -100 counts not.

        Many logits are never held all at once: a few rows of them at a time become their own gradient.
        """
        hidden = self.hidden(tokens)
        if targets.numel() * self.config.vocab_size > WHOLE_LOGITS:
            return self.head(hidden, targets).float()
        return cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten()).float()

    def new_cache(self, batch_size: int = 1) -> KVCache:
        """An empty key/value cache for ``batch_size`` sequences of up to context_length tokens."""
        weight = self.head.weight
        return KVCache(self.config, batch_size, dtype=weight.dtype, device=weight.device)

    def num_parameters(self) -> int:
        """Parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token: 6 N + 12 layers x hidden x context (PaLM's, and nanoGPT's, formula).

        N counts the weights that take part in products (the head too, the embedding look-ups not). Attention is
        counted as if it were not causal, as the formula's other users do.
        """
        context_length = context_length or self.config.context_length
        lookups = 0 if self.config.tie_embeddings else self.token_embedding.weight.numel()
        if self.config.positions == "learned":
            lookups += self.position_embedding.weight.numel()
        attention_flops = 12 * self.config.num_layers * self.config.hidden_size * context_length
        return 6 * (self.num_parameters() - lookups) + attention_flops
