"""Which precision is the faster one on this device, measured when a run starts."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..timing import seconds as seconds_of
from .device import autocast, keep_random_state, narrow_dtype
from .objective import Batch, Objective, to_device

# A precision whose best time is this many times the other's is not tried further. A guess: on a machine with other
# work, times that are taken in turns spread by less.
CLEARLY = 1.5
# The first round sets things up and counts only where it is the only one. On a loaded machine one pass of 2 ms took 360
# ms. So a choice by fewer than SURE_ROUNDS rounds takes at least SHARE of the time.
MIN_ROUNDS, SURE_ROUNDS, MAX_ROUNDS = 2, 6, 21
SHARE = 1 / 3


def faster_dtype(
    objective: Objective, model: nn.Module, batch: Batch, seconds: float = 3.0
) -> tuple[str, dict[str, float]]:
    """The precision in which a forward and a backward pass on ``batch`` take less time, and the seconds of each.

    A CPU without products of bfloat16 takes float32, and nothing is timed. Elsewhere float32 and the device's 16-bit
    dtype, bfloat16 or on GPUs without it float16, are timed in turns on a copy of ``model``, for about ``seconds`` and
    at most 20 rounds, until one is clearly behind. The shortest time counts, so that other work on the machine disturbs
    the choice as little as possible. ``model`` and torch's random state stay as they are.
    """
    device = next(model.parameters()).device
    narrow = narrow_dtype(device)
    if narrow is None:
        return "float32", {}
    trial = copy.deepcopy(model).train()
    batch = to_device(batch, device)
    times: dict[str, list[float]] = {"float32": [], narrow: []}

    def run(dtype: str) -> None:
        with autocast(device, dtype):
            loss = torch.stack([*objective.losses(trial, batch).values()]).sum()
        loss.backward()

    with keep_random_state(device):
        for done in range(1, MAX_ROUNDS + 1):
            for dtype, taken in times.items():
                taken.append(seconds_of(lambda dtype=dtype: run(dtype), device))
            best = {dtype: min(taken[1:] or taken) for dtype, taken in times.items()}
            behind = max(best.values()) > CLEARLY * min(best.values())
            spent = sum(map(sum, times.values()))
            sure = behind and (done >= SURE_ROUNDS or spent > SHARE * seconds)
            if (done >= MIN_ROUNDS and (sure or spent > seconds)) or (behind and spent > seconds):
                break
    return min(best, key=best.__getitem__), best
