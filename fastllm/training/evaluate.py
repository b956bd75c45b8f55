"""Bits per byte on the whole validation split. Nothing here touches the state of training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ..data import TokenFile, evaluation_batches
from ..data.batches import IGNORE
from .measure import autocast

# What follows a score's number where its name would not do.
UNITS = {"bits_per_byte": "bits/byte"}


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over the ``tokens`` (or other targets) scored; ``scores`` by name; ``main`` is the one to show.

    For language models that is ``bits_per_byte``.
    """

    loss: float
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    main: str = "bits_per_byte"

    @property
    def bits_per_byte(self) -> float | None:
        return self.scores.get("bits_per_byte")

    def headline(self) -> str:
        """The main score, for people."""
        return f"{self.scores[self.main]:.3f} {UNITS.get(self.main, self.main)}"


def bits_per_byte(loss: float, tokens: TokenFile) -> float:
    """Nats per token as bits for each UTF-8 byte of the text, by the number of both in ``tokens``."""
    return loss / math.log(2) * (len(tokens) - 1) / tokens.bytes


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: TokenFile, context_length: int, batch_size: int, dtype: str = "float32", limit: int = 0
) -> Evaluation:
    """How well ``model`` predicts ``tokens``, in at most ``limit`` windows spread evenly; 0: in all.

    Each token but the first, which is an end-of-text, is scored once, in windows of ``context_length`` that overlap
    by half: beyond the first window every token has at least half a window of context. End-of-text tokens are
    scored and count no bytes. Dropout is off, so no random number is drawn.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    try:
        stride = max(1, context_length // 2)
        for inputs, targets in evaluation_batches(tokens.tokens, context_length, stride, batch_size, limit):
            scored = int((targets != IGNORE).sum())
            with autocast(device, dtype):
                loss = model.loss(inputs.to(device), targets.to(device))
            nats += loss.item() * scored
            count += scored
    finally:
        model.train(was_training)
    return Evaluation(nats / count, count, {"bits_per_byte": bits_per_byte(nats / count, tokens)})
