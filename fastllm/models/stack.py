"""Transformer stacks: an encoder and a decoder that take the same places as the recurrent ones."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import nn as fast
from ..backends import under_transform
from . import next_token
from .blocks import Block, Context, Stream, relative_bucket, rotary_tables
from .cache import Encoded, KVCache, check_cache
from .config import ModelConfig
from .embedding import Embedded, make_norm


def check_counts(name: str, counts: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raise TypeError where ``counts`` is no tensor of integers, ValueError where it has not one for each sequence."""
    if not isinstance(counts, torch.Tensor) or counts.dtype not in (torch.int64, torch.int32):
        got = counts.dtype if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise TypeError(f"{name} must be a tensor of int64 or int32, got {got}")
    if counts.shape != tokens.shape[:1]:
        raise ValueError(f"{name} must be ({len(tokens)},), one for each sequence, got {list(counts.shape)}")


def length_mask(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, S), True for the first ``lengths[b]`` of each row; on the tokens' device, wherever the lengths are.

    Raises:
        TypeError: ``lengths`` is no tensor of integers.
        ValueError: its shape is not (B,), or, on a CPU, a length is below 0 or above S.
    """
    check_counts("lengths", lengths, tokens)
    readable = lengths.device.type == "cpu" and type(lengths) is torch.Tensor
    readable = readable and not (torch.compiler.is_compiling() or under_transform())
    if readable and bool(((lengths < 0) | (lengths > tokens.shape[1])).any()):
        raise ValueError(f"lengths must be from 0 to {tokens.shape[1]}, got {lengths.tolist()}")
    # From pinned memory, as training's batches are, the host does not wait for the copy.
    there = lengths.to(tokens.device, non_blocking=tokens.is_cuda)
    return torch.arange(tokens.shape[1], device=tokens.device) < there[:, None]


def run_blocks(stack: Embedded, x: torch.Tensor, *arguments) -> torch.Tensor:
    """``x`` through ``stack.blocks``, which also take ``arguments``, and the last norm."""
    stream = Stream(x)
    for layer, block in enumerate(stack.blocks):
        if stack.checkpoint_activations and torch.is_grad_enabled():
            # One tensor is kept of a block, not two.
            stream = checkpoint(block, Stream(stream.whole()), *arguments, layer, use_reentrant=False)
        else:
            stream = block(stream, *arguments, layer)
    normed, _ = stream.normed(stack.norm)
    return normed


class TransformerStack(Embedded):
    """Embeddings, blocks and the last norm; where the norm comes after each branch, there is no last one."""

    rotary_cos: torch.Tensor
    rotary_sin: torch.Tensor

    def __init__(self, config: ModelConfig, layers: int, causal: bool, cross: bool):
        super().__init__(config, positions=True)
        if config.positions == "rotary":
            cos, sin = rotary_tables(config.context_length, config.head_dim, config.rotary_base)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        elif config.positions == "relative":
            self.relative_bias = fast.Embedding(config.relative_buckets, config.num_heads)
        self.causal = causal
        self.blocks = nn.ModuleList(Block(config, cross) for _ in range(layers))
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()

    def _bias(self, start: int, end: int) -> torch.Tensor:
        """What relative positions add to the scores of queries start .. end - 1, (1, H, end - start, end)."""
        device = self.relative_bias.weight.device
        distance = torch.arange(end, device=device) - torch.arange(start, end, device=device)[:, None]
        config = self.config
        bucket = relative_bucket(distance, config.relative_buckets, config.relative_distance, self.causal)
        return self.relative_bias(bucket).permute(2, 0, 1)[None]

    def _next_bias(self, cache: KVCache) -> torch.Tensor:
        """:meth:`_bias` of the token after those in ``cache``; it depends on the distances alone, which come again."""
        if cache.made_by() is not self:
            return self._bias(cache.length, cache.length + 1)
        last = self.config.context_length - 1
        if cache.relative_bias is None:
            cache.relative_bias = self._bias(last, last + 1).contiguous()
        return cache.relative_bias[..., last - cache.length :]


class TransformerEncoder(TransformerStack):
    """Every token sees every other one of its sequence.

    ``packed``: leave padding out, so that linear layers, norms and attention see the tokens alone. None: on a GPU. Both
    give the same states where there are tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.encoder_layers, causal=False, cross=False)
        self.packed: bool | None = None

    def encode(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> Encoded:
        """States of ``tokens`` (B, S), whose row b has ``lengths[b]`` tokens (all if None); 0 at padding.

        Args:
            lengths: (B,) int32 or int64, each from 0 to S. In host memory they spare the host a wait for a GPU: how
                many tokens there are in all decides what is computed where padding is left out.
            segments: (B, S) ids of the segment embedding; None: all 0.

        Raises:
            ValueError: an argument's shape or dtype does not fit, or tokens reach past context_length.
            IndexError: a token is not in the vocabulary (on CPU).
        """
        self.check_tokens(tokens)
        packed = tokens.is_cuda if self.packed is None else self.packed
        if lengths is not None and packed:
            return self._encode_packed(tokens, lengths, segments)
        length = tokens.shape[1]
        mask = None if lengths is None else length_mask(tokens, lengths)
        bias = self._bias(0, length) if self.positions == "relative" else None
        if mask is not None:
            visible = mask[:, None, None, :]
            bias = visible if bias is None else bias.masked_fill(~visible, -torch.inf)
        rotary = (self.rotary_cos[:length], self.rotary_sin[:length]) if self.positions == "rotary" else None
        states = run_blocks(self, self.embed(tokens, None, segments), Context(causal=False, rotary=rotary, bias=bias))
        return Encoded(states if mask is None else states * mask[..., None], mask)

    def _encode_packed(self, tokens: torch.Tensor, lengths: torch.Tensor, segments: torch.Tensor | None) -> Encoded:
        """:meth:`encode` of the tokens alone, one sequence after the other."""
        length, mask = tokens.shape[1], length_mask(tokens, lengths)
        bias = self._bias(0, length) if self.positions == "relative" else None
        count = int(lengths.clamp(0, length).sum())
        # Not mask.nonzero(), which has the host wait to learn how many there are.
        each = mask.sum(1)
        starts = torch.nn.functional.pad(each.cumsum(0), (1, 0))
        row = torch.repeat_interleave(each, output_size=count)
        positions = torch.arange(count, device=tokens.device) - starts[row]
        there = row * length + positions
        rotary = None
        if self.positions == "rotary":
            rotary = (self.rotary_cos[positions], self.rotary_sin[positions])
        segments = None if segments is None else segments.flatten()[there]
        x = self.embed(tokens.flatten()[there], positions, segments)
        context = Context(causal=False, rotary=rotary, bias=bias, sequences=(starts.int(), length))
        x = run_blocks(self, x, context)
        states = x.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, there, x)
        return Encoded(states.view(*mask.shape, x.shape[-1]), mask)


class TransformerDecoder(TransformerStack):
    """Every token sees those before it, and with ``cross`` all states of an encoder."""

    def __init__(self, config: ModelConfig, cross: bool):
        super().__init__(config, config.num_layers, causal=True, cross=cross)

    def decode(
        self, tokens: torch.Tensor, memory: Encoded | None = None, cache: KVCache | None = None,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The normed last states (B, T, hidden_size) of ``tokens`` (B, T).

        Args:
            memory: what cross-attention reads; with a cache it is read at the first call only.
            cache: from :meth:`new_cache`; ``tokens`` follow those that it holds, and are added.
            prefix: (B,), how many first tokens of each row all its tokens see, later ones too (prefix LM).

        Raises:
            TypeError: ``cache`` is of another kind of decoder, or ``prefix`` no tensor of int64 or int32.
            ValueError: ``prefix`` is not (B,), or an argument does not fit.
        """
        check_cache(cache, KVCache)
        start = 0 if cache is None else cache.length
        self.check_tokens(tokens, start)
        end = start + tokens.shape[1]
        # None: positions from 0, whose gradient needs no sort.
        positions = None if start == 0 else torch.arange(start, end, device=tokens.device)
        context = Context(causal=prefix is None, cache=cache)
        context.memory, context.memory_mask = (memory or (None, None)) if cache is None else cache.read(memory)
        if self.positions == "rotary":
            context.rotary = (self.rotary_cos[start:end], self.rotary_sin[start:end])
        elif self.positions == "relative":
            if cache is not None and end == start + 1 and not torch.is_grad_enabled():
                context.bias = self._next_bias(cache)
            else:
                context.bias = self._bias(start, end)
        if prefix is not None:
            check_counts("prefix", prefix, tokens)
            key = torch.arange(end, device=tokens.device)
            seen = (key <= torch.arange(start, end, device=tokens.device)[:, None]) | (key < prefix[:, None, None])
            seen = seen[:, None]
            context.bias = seen if context.bias is None else context.bias.masked_fill(~seen, -torch.inf)
        x = self.embed(tokens, positions)
        step = None
        if cache is not None and start and end == start + 1 and prefix is None and next_token.allowed(self):
            # The step of another decoder's cache would go on with that one's weights.
            step = cache.step if cache.made_by() is self else None
        x = run_blocks(self, x, context) if step is None else step(x, context)
        if cache is not None:
            cache.length = end
        return x

    def new_cache(self, batch_size: int = 1) -> KVCache:
        """An empty key/value cache for ``batch_size`` sequences of up to context_length tokens."""
        weight = self.token_embedding.weight
        cache = KVCache(self.config, batch_size, dtype=weight.dtype, device=weight.device)
        cache.made_by = weakref.ref(self)
        if next_token.applies(self):
            cache.step = next_token.NextToken(self)
        return cache
