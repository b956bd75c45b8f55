"""One step of training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..data.batches import IGNORE
from ..models import Transformer
from .measure import autocast
from .optimizer import Optimizers


def train_step(
    loss_function: Callable,
    model: Transformer,
    optimizers: Optimizers,
    batch: tuple[torch.Tensor, torch.Tensor],
    *,
    rows: int,
    clip: float,
    dtype: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step on ``batch`` (in host memory), ``rows`` sequences at a time.

    Each part counts by its number of targets, so loss and gradient are those of the whole batch, however it is cut.

    Returns:
        The batch's mean loss and the global norm of its gradient before clipping, on the device, not synchronised.
    """
    tokens, targets = batch
    device = next(model.parameters()).device
    total = int((targets != IGNORE).sum())
    loss = torch.zeros((), device=device)
    for part_tokens, part_targets in zip(tokens.split(rows), targets.split(rows), strict=True):
        count = int((part_targets != IGNORE).sum())
        if not count:
            continue  # its mean would be 0 / 0
        with autocast(device, dtype):
            part_loss = loss_function(part_tokens.to(device), part_targets.to(device)) * (count / total)
        part_loss.backward()
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    optimizers.step()
    return loss, norm
