"""Recurrent encoders and decoders, LSTM or GRU, in the places of the Transformer's.

Each layer is a recurrence around a residual, with the norm before it, and in a translating decoder attention to the
encoder's states after it (RNMT+, Chen et al. 2018). Over a whole sequence the recurrence is torch.nn's, which is
cuDNN's on a GPU; attention reads all its outputs at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import cpu
from .. import nn as fast
from .blocks import Context, CrossAttention, Residual, Stream
from .cache import Encoded, RecurrentCache, check_cache
from .config import ModelConfig
from .embedding import Embedded, make_norm
from .stack import length_mask, run_blocks


def _autocast_fails(device: torch.device) -> bool:
    """Whether autocast is on and PyTorch's LSTM fails under it: on a CPU it asks oneDNN for one in fp16, and for one in
    bf16 even if the CPU has no products of it, and oneDNN has neither (PyTorch 2.13)."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    dtype = torch.get_autocast_dtype("cpu")
    return dtype != torch.bfloat16 or not cpu.multiplies(dtype)


class LongestFirst(NamedTuple):
    """Sequences in the order in which cuDNN takes them: their lengths, in host memory, and where each comes from.

    ``order`` and ``back``, which undoes it, are on the sequences' device.
    """

    lengths: torch.Tensor
    order: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, device: torch.device) -> LongestFirst:
        """Of ``lengths``, for which the host waits where they are on a GPU."""
        lengths, order = lengths.cpu().sort(descending=True)
        places = order, order.argsort()
        if device.type != "cuda":
            return cls(lengths, *(place.to(device) for place in places))
        return cls(lengths, *(place.pin_memory().to(device, non_blocking=True) for place in places))


class RecurrentBlock(Residual):
    """Recurrence and, with ``cross``, attention to an encoder's states."""

    def __init__(self, config: ModelConfig, kind: str, bidirectional: bool, cross: bool):
        super().__init__(config)
        recurrence = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        size = config.hidden_size
        self.recurrence_norm = make_norm(config)
        # Both directions together are as wide as the stream.
        self.recurrence = recurrence(size, size // (1 + bidirectional), batch_first=True, bidirectional=bidirectional)
        self.out = fast.Linear(size, size, bias=config.bias)
        self.cross = cross
        if cross:
            self.cross_norm = make_norm(config)
            self.cross_attention = CrossAttention(config)
        if kind == "lstm":
            # A forget gate that starts open keeps what was seen (Jozefowicz et al. 2015). The order of gates: input,
            # forget, cell, output.
            with torch.no_grad():
                for name, bias in self.recurrence.named_parameters():
                    if name.startswith("bias_hh"):
                        bias.chunk(4)[1].fill_(1.0)

    def projections(self) -> list[nn.Linear]:
        """What writes into the residual stream."""
        return [self.out, *([self.cross_attention.out] if self.cross else [])]

    def _directions(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Both directions of sequences that padding follows, one after the other, each from its own beginning.

        On a CPU oneDNN computes an LSTM over whole sequences; packed ones torch computes step by step.
        """
        place = torch.arange(x.shape[1], device=x.device)
        # The last token first, padding where it is: its own inverse.
        mirror = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)[..., None]
        weights = self.recurrence._flat_weights
        results = []
        for reverse in (False, True):
            own = weights[len(weights) // 2 :] if reverse else weights[: len(weights) // 2]
            turned = x.gather(1, mirror.expand_as(x)) if reverse else x
            zeros = x.new_zeros(1, len(x), self.recurrence.hidden_size)
            if isinstance(self.recurrence, nn.LSTM):
                out = torch.lstm(turned, (zeros, zeros), own, True, 1, 0.0, self.training, False, True)[0]
            else:
                out = torch.gru(turned, zeros, own, True, 1, 0.0, self.training, False, True)[0]
            results.append(out.gather(1, mirror.expand_as(out)) if reverse else out)
        return torch.cat(results, -1)

    def _packed(self, x: torch.Tensor, sequences: LongestFirst) -> torch.Tensor:
        """The same by one call of the recurrence. torch's own sorting would have the host wait for a GPU."""
        packed = pack_padded_sequence(x.index_select(0, sequences.order), sequences.lengths, batch_first=True)
        out, _ = self.recurrence(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return padded.index_select(0, sequences.back)

    def _recur(
        self, x: torch.Tensor, sequences: torch.Tensor | LongestFirst | None, cache: RecurrentCache | None, layer: int
    ):
        if not _autocast_fails(x.device):
            return self._states(x, sequences, cache, layer)
        with torch.autocast("cpu", enabled=False):
            return self._states(x.to(self.recurrence.weight_ih_l0.dtype), sequences, cache, layer)

    def _states(
        self, x: torch.Tensor, sequences: torch.Tensor | LongestFirst | None, cache: RecurrentCache | None, layer: int
    ):
        """What the recurrence gives at each position."""
        if isinstance(sequences, LongestFirst):
            return self._packed(x, sequences)
        if sequences is not None:
            return self._directions(x, sequences)
        state = None if cache is None else cache.state(layer)
        if state is not None and isinstance(self.recurrence, nn.GRU):
            (state,) = state
        out, state = self.recurrence(x, state)
        if cache is not None:
            cache.store(layer, state if isinstance(state, tuple) else (state,))
        return out

    def forward(
        self, stream: Stream, context: Context, sequences: torch.Tensor | LongestFirst | None, layer: int
    ) -> Stream:
        """``sequences``: the lengths of those that padding follows, on a CPU as a tensor."""
        stream = self.add(
            stream, self.recurrence_norm, lambda x: self.out(self._recur(x, sequences, context.cache, layer))
        )
        if self.cross:
            stream = self.add(stream, self.cross_norm, lambda x: self.cross_attention(x, context, layer))
        return stream


class RecurrentStack(Embedded):
    """Embeddings, recurrent blocks and the last norm. The order of tokens needs no positions."""

    def __init__(self, config: ModelConfig, kind: str, layers: int, bidirectional: bool, cross: bool):
        super().__init__(config, positions=False)
        self.blocks = nn.ModuleList(RecurrentBlock(config, kind, bidirectional, cross) for _ in range(layers))
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()


class RecurrentEncoder(RecurrentStack):
    """Reads in both directions, half of the width each. Padding is left out; cuDNN wants its lengths on the host."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.encoder, config.encoder_layers, bidirectional=True, cross=False)

    def encode(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> Encoded:
        """As :meth:`fastllm.models.stack.TransformerEncoder.encode`; every length is at least 1."""
        self.check_tokens(tokens)
        mask = None if lengths is None else length_mask(tokens, lengths)
        x = self.embed(tokens, None, segments)
        sequences = lengths
        if lengths is not None and x.device.type != "cpu":
            sequences = LongestFirst.of(lengths, x.device)
        states = run_blocks(self, x, Context(causal=False), sequences)
        return Encoded(states if mask is None else states * mask[..., None], mask)


class RecurrentDecoder(RecurrentStack):
    """Reads from the left, and with ``cross`` attends to all states of an encoder."""

    def __init__(self, config: ModelConfig, cross: bool):
        super().__init__(config, config.decoder, config.num_layers, bidirectional=False, cross=cross)

    def decode(
        self, tokens: torch.Tensor, memory: Encoded | None = None, cache: RecurrentCache | None = None,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As :meth:`fastllm.models.stack.TransformerDecoder.decode`, but without a prefix: it reads in one direction.

        Raises:
            TypeError: ``cache`` is of another kind of decoder.
            ValueError: ``prefix`` is given, or an argument does not fit.
        """
        check_cache(cache, RecurrentCache)
        if prefix is not None:
            raise ValueError("prefix: a recurrent decoder reads in one direction only")
        start = 0 if cache is None else cache.length
        self.check_tokens(tokens, start)
        context = Context(causal=True, cache=cache)
        context.memory, context.memory_mask = (memory or (None, None)) if cache is None else cache.read(memory)
        x = run_blocks(self, self.embed(tokens), context, None)
        if cache is not None:
            cache.length = start + tokens.shape[1]
        return x

    def new_cache(self, batch_size: int = 1) -> RecurrentCache:
        """An empty cache for ``batch_size`` sequences."""
        return RecurrentCache(batch_size)
