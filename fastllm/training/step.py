"""One step of training: the gradient of a whole batch. Whoever asks for it decides whether the update is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .device import autocast
from .dropout import set_first_row
from .objective import Batch, Objective, rows_of, to_device
from .optimizer import Optimizers
from .parallel.ranks import ALONE, Losses, Ranks


class StepSettings(NamedTuple):
    """How a step is computed.

    ``micro_batch_size``: sequences that are computed at a time. ``clip``: largest global norm of the gradient; 0 or
    less: any. ``dtype``: "float32", or "bfloat16" or "float16" by autocast. ``seed``: of dropout; with
    :func:`fastllm.training.dropout.key_dropout` a row's mask depends on it and on the row alone. None: torch's
    generator goes on from where it is. ``loss_scale``: a power of 2 that the loss is multiplied with and the gradients
    are divided by, see :mod:`.loss_scale`.
    """

    micro_batch_size: int
    clip: float
    dtype: str
    seed: int | None = None
    loss_scale: float = 1.0


class Step(NamedTuple):
    """A batch's mean loss, the global norm of its gradient before clipping, the loss's terms by name.

    Scalar tensors on the device, which is not waited for.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    terms: dict[str, torch.Tensor]


def batch_gradients(
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    settings: StepSettings,
    *,
    losses: Losses | None = None,
    ranks: Ranks = ALONE,
    mark: Callable[[str], None] = lambda name: None,
) -> Step:
    """Leave the clipped gradient of ``batch`` (in host memory) in ``model``, computed a micro-batch at a time.

    Each micro-batch has the weight of its number of targets, so loss and gradient are those of the whole batch,
    however it is cut. With several ``ranks`` every one is given the whole batch and computes its own rows of it;
    gradients are exchanged once, with the last micro-batch.

    Args:
        losses: the objective's own, or what torch.compile made of them.
        mark: called with "forward" before the micro-batch that exchanges gradients.
    """
    losses = losses or objective.losses
    device = next(model.parameters()).device
    totals = objective.counts(batch)
    mine, first = ranks.mine(batch)
    micro_batches = []
    for index, part in enumerate(rows_of(mine, settings.micro_batch_size)):
        # A mean over no targets would be 0 / 0.
        counts = {name: count for name, count in objective.counts(part).items() if count}
        weights = {name: count / totals[name] for name, count in counts.items()}
        if counts or ranks.size > 1:
            micro_batches.append((first + index * settings.micro_batch_size, part, weights))
    loss = torch.zeros((), device=device)
    terms = {name: torch.zeros((), device=device) for name in totals}
    # What makes a sum of the ranks' mean. In float16 it would bring an overflow nearer, so it waits for the division.
    early, late = (1, ranks.averaged) if settings.dtype == "float16" else (ranks.averaged, 1)
    stand_in = None if ranks.size == 1 else ranks.stand_in(objective, batch, settings.micro_batch_size)
    for index, (first_row, part, weights) in enumerate(micro_batches):
        set_first_row(model, first_row)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        last = index == len(micro_batches) - 1
        if last:
            mark("forward")
        # With several ranks each has to reach every parameter, so a term without targets here is computed elsewhere.
        short = stand_in is not None and len(weights) < len(totals)
        elsewhere = to_device(stand_in, device) if stand_in is not None and short else None
        with ranks.exchange(last):
            with autocast(device, settings.dtype):
                shares = ranks.shares(losses, model, to_device(part, device), weights, elsewhere)
                share: torch.Tensor = sum(shares.values(), start=torch.zeros((), device=device))
            (share * (settings.loss_scale * early)).backward()
        loss += share.detach()
        for name in weights:
            terms[name] += shares[name].detach()
    ranks.sum_([loss, *terms.values()])
    if late != settings.loss_scale:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(late / settings.loss_scale)
    norm = ranks.clip(model, settings.clip if settings.clip > 0 else math.inf)
    return Step(loss, norm, terms)


def train_step(
    objective: Objective, model: nn.Module, optimizers: Optimizers, batch: Batch, settings: StepSettings
) -> Step:
    """:func:`batch_gradients` and the update, by one process."""
    step = batch_gradients(objective, model, batch, settings)
    optimizers.step()
    return step
