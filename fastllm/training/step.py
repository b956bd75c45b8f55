"""One step of training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .dropout import set_first_row
from .measure import autocast
from .objectives.base import Batch, Objective, rows_of, to_device
from .optimizer import Optimizers
from .parallel.ranks import ALONE, Losses, Ranks


def train_step(
    objective: Objective,
    model: nn.Module,
    optimizers: Optimizers,
    batch: Batch,
    *,
    rows: int,
    clip: float,
    dtype: str,
    losses: Losses | None = None,
    seed: int | None = None,
    ranks: Ranks = ALONE,
    accept: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], bool] | None = None,
    mark: Callable[[str], None] = lambda name: None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """One optimiser step on ``batch`` (in host memory), ``rows`` sequences at a time.

    Each part counts by its number of targets, so loss and gradient are those of the whole batch, however it is cut.
    With several ``ranks`` every one is given the whole batch and computes its own rows of it; gradients are exchanged
    once, with the last part.

    Args:
        losses: the objective's own, or what ``ranks.losses`` or torch.compile made of them.
        seed: of dropout. With modules from :func:`fastllm.training.dropout.key_dropout` a row's mask depends on it and
            on the row alone. None: torch's generator goes on from where it is.
        accept: given what is returned, whether the update is made; without it always. Else the gradient is dropped.
        mark: called with "forward" before the part that exchanges gradients, "backward" when the gradient is there,
            and "update" after the optimiser.

    Returns:
        The batch's loss, the global norm of its gradient before clipping, and the loss's terms by name, on the device,
        not synchronised.
    """
    losses = losses or objective.losses
    device = next(model.parameters()).device
    totals = objective.counts(batch)
    mine, first = ranks.mine(batch)
    parts = []
    for index, part in enumerate(rows_of(mine, rows)):
        # A mean over no targets would be 0 / 0.
        counts = {name: count for name, count in objective.counts(part).items() if count}
        weights = {name: count / totals[name] for name, count in counts.items()}
        if counts or ranks.size > 1:
            parts.append((first + index * rows, part, weights))
    loss = torch.zeros((), device=device)
    terms = {name: torch.zeros((), device=device) for name in totals}
    spare = None if ranks.size == 1 else ranks.spare(objective, batch, rows)
    for index, (row, part, weights) in enumerate(parts):
        set_first_row(row)
        if seed is not None:
            torch.manual_seed(seed)
        last = index == len(parts) - 1
        if last:
            mark("forward")
        # With several ranks each has to reach every parameter, so a term without targets here is computed elsewhere.
        lacking = to_device(spare, device) if spare is not None and len(weights) < len(totals) else None
        with ranks.exchange(last):
            with autocast(device, dtype):
                shares = ranks.shares(losses, model, to_device(part, device), weights, lacking)
                part_loss = sum(shares.values())
            part_loss.backward(ranks.upstream(part_loss))
        loss += part_loss.detach()
        for name in weights:
            terms[name] += shares[name].detach()
    ranks.sum_([loss, *terms.values()])
    norm = ranks.clip(model, clip if clip > 0 else math.inf)
    taken = accept is None or accept(loss, norm, terms)
    mark("backward")
    if taken:
        optimizers.step()
    else:
        optimizers.zero_grad()
    mark("update")
    return loss, norm, terms
