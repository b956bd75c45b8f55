"""Bits per byte on the whole validation split. Nothing here touches the state of training."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..data import TokenFile, evaluation_batches
from ..data.batches import IGNORE
from .measure import autocast


def bits_per_byte(nats: float, tokens: TokenFile) -> float:
    """A sum of cross-entropies over the whole of ``tokens``, as bits for each UTF-8 byte of its text."""
    return nats / math.log(2) / tokens.bytes


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: TokenFile, context_length: int, batch_size: int, dtype: str = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy in nats per token, and bits per byte, of all ``tokens``.

    Each token but the first, which is an end-of-text, is scored once, in windows of ``context_length`` that overlap
    by half: beyond the first window every token has at least half a window of context. End-of-text tokens are
    scored and count no bytes. Dropout is off, so no random number is drawn.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    try:
        for inputs, targets in evaluation_batches(
            tokens.tokens, context_length, max(1, context_length // 2), batch_size
        ):
            scored = int((targets != IGNORE).sum())
            with autocast(device, dtype):
                loss = model.loss(inputs.to(device), targets.to(device))
            nats += loss.item() * scored
            count += scored
    finally:
        model.train(was_training)
    return nats / count, bits_per_byte(nats, tokens)
