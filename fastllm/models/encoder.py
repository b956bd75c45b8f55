"""An encoder with heads: masked tokens, whether two texts follow each other, classes, answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as fast
from .cache import Encoded
from .config import ModelConfig
from .conv import ConvEncoder
from .embedding import INITIAL_STD, make_norm
from .head import Head
from .pretrained import Pretrained, concrete
from .rnn import RecurrentEncoder
from .stack import TransformerEncoder
from .transformer import flops_per_token


def make_encoder(config: ModelConfig) -> TransformerEncoder | RecurrentEncoder | ConvEncoder:
    """The encoder that ``config.encoder`` names, not initialised."""
    return {"transformer": TransformerEncoder, "conv": ConvEncoder}.get(config.encoder, RecurrentEncoder)(config)


class MaskedHead(nn.Module):
    """BERT's head over the vocabulary: linear, GELU, norm, and the token embedding as the last matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.transform = fast.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = make_norm(config)
        self.head = Head(config.hidden_size, config.vocab_size, bias=config.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.transform(states)))


@concrete
class Encoder(Pretrained):
    """An encoder and the heads that ``config.heads`` names.

    ``mlm``: logits of masked tokens; ``nsp``: 2 logits, whether the second text follows the first; ``classify``:
    num_classes logits; ``span``: logits of an answer's first and last token. nsp and classify read the first token
    through a tanh layer, as BERT does (Devlin et al. 2019), or as ``config.pooling`` says.

    Raises:
        ValueError: ``config`` has a decoder.
    """

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        return config.decoder == "none"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._check_fits(config)
        self.config = config
        self.encoder = make_encoder(config)
        size, heads, first = config.hidden_size, config.heads, config.pooling == "first"
        self.masked = MaskedHead(config) if "mlm" in heads else None
        self.pooler = fast.Linear(size, size) if {"nsp", "classify"} & set(heads) and first else None
        self.next = fast.Linear(size, 2) if "nsp" in heads else None
        self.classifier = fast.Linear(size, config.num_classes) if "classify" in heads else None
        self.span = fast.Linear(size, 2) if "span" in heads else None
        self.dropout = nn.Dropout(config.dropout)
        self.encoder.initialize()
        for head in (self.masked, self.pooler, self.next, self.classifier, self.span):
            for module in () if head is None else head.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=INITIAL_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if self.masked is not None and config.tie_embeddings:
            self.masked.head.weight = self.encoder.token_embedding.weight

    @property
    def checkpoint_activations(self) -> bool:
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.encoder.checkpoint_activations = value

    def encode(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> Encoded:
        """States of ``tokens`` (B, S), whose row b has ``lengths[b]`` tokens; ``segments`` (B, S)."""
        return self.encoder.encode(tokens, lengths, segments)

    forward = encode

    def _head(self, name: str) -> Any:
        head = getattr(self, name)
        if head is None:
            raise ValueError(
                f"this encoder has no head for that; its heads are {', '.join(self.config.heads) or 'none'}"
            )
        return head

    def _pooled(self, encoded: Encoded) -> torch.Tensor:
        states, mask = encoded
        if self.pooler is not None:
            return self.dropout(torch.tanh(self.pooler(states[:, 0])))
        there = torch.ones_like(states[..., :1], dtype=torch.bool) if mask is None else mask[..., None]
        if self.config.pooling == "max":
            largest = states.masked_fill(~there, -torch.inf).amax(1)
            return self.dropout(largest.masked_fill(~there.any(1), 0.0))
        return self.dropout((states * there).sum(1) / there.sum(1).clamp(min=1))

    def masked_logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., vocab_size) for states (..., hidden_size)."""
        head = self._head("masked")
        return head.head(head(states)) * self.config.logit_scale

    def masked_loss(self, encoded: Encoded, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of ``targets`` (B, M) at ``positions`` (B, M); -100 is ignored.

        Only these rows are multiplied by the head, and on a CPU only those whose target is not -100.
        """
        head = self._head("masked")
        rows = encoded.states.gather(1, positions[..., None].expand(-1, -1, encoded.states.shape[-1]))
        return head.head.loss(head(rows), targets, self.config.logit_scale)

    def next_logits(self, encoded: Encoded) -> torch.Tensor:
        """Logits (B, 2): class 0, the second text follows the first; class 1, it does not."""
        return self._head("next")(self._pooled(encoded))

    def class_logits(self, encoded: Encoded) -> torch.Tensor:
        """(B, num_classes)."""
        return self._head("classifier")(self._pooled(encoded))

    def span_logits(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, S) of an answer's first and last token, -inf at padding."""
        logits = self._head("span")(encoded.states)
        if encoded.mask is not None:
            logits = logits.masked_fill(~encoded.mask[..., None], -torch.inf)
        return logits[..., 0], logits[..., 1]

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs per token, as if every token reached the head: :func:`flops_per_token`."""
        return flops_per_token(self, context_length or self.config.context_length)
