"""One step of training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .measure import autocast
from .objectives import Batch, Objective, rows_of, to_device
from .optimizer import Optimizers


def train_step(
    objective: Objective,
    model: nn.Module,
    optimizers: Optimizers,
    batch: Batch,
    *,
    rows: int,
    clip: float,
    dtype: str,
    losses: Callable[[nn.Module, Batch], dict[str, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """One optimiser step on ``batch`` (in host memory), ``rows`` sequences at a time.

    Each part counts by its number of targets, so loss and gradient are those of the whole batch, however it is cut.

    Args:
        losses: the objective's own, or a compiled form of it.

    Returns:
        The batch's loss, the global norm of its gradient before clipping, and the loss's terms by name, on the device,
        not synchronised.
    """
    losses = losses or objective.losses
    device = next(model.parameters()).device
    totals = objective.counts(batch)
    loss = torch.zeros((), device=device)
    terms = {name: torch.zeros((), device=device) for name in totals}
    for part in rows_of(batch, rows):
        # A mean over no targets would be 0 / 0.
        counts = {name: count for name, count in objective.counts(part).items() if count}
        if not counts:
            continue
        with autocast(device, dtype):
            means = losses(model, to_device(part, device))
            shares = {name: means[name] * (count / totals[name]) for name, count in counts.items()}
        part_loss = sum(shares.values())
        part_loss.backward()
        loss += part_loss.detach()
        for name, share in shares.items():
            terms[name] += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    optimizers.step()
    return loss, norm, terms
