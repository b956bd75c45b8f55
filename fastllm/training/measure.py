"""Which precision is the faster one on this device, measured when a run starts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from ..cpu import matmul_dtype
from .objectives.base import Batch, Objective, to_device


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_random_state(device: torch.device):
    """Within the block, torch's default generators may be drawn from and seeded; afterwards they are as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast for ``dtype`` "bfloat16"; does nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


# A precision whose best time is so many times the other's is not tried further (a guess: times in turns on a machine
# with other work spread by less).
CLEARLY = 1.5
# Rounds, of which the first sets things up and does not count where there are others.
FEWEST, MOST = 2, 21


def faster_dtype(
    objective: Objective, model: nn.Module, batch: Batch, seconds: float = 3.0
) -> tuple[str, dict[str, float]]:
    """The precision in which a forward and a backward pass on ``batch`` take less time, and the seconds of each.

    A CPU without products of bfloat16 takes float32, and nothing is timed. Elsewhere the two are timed in turns on a
    copy of ``model``, for about so many ``seconds`` and at most 20 rounds, until one is clearly behind; the shortest
    time counts, so that other work on the machine disturbs the choice as little as possible. ``model`` and torch's
    random state stay as they are.
    """
    device = next(model.parameters()).device
    if matmul_dtype(device) == torch.float32:
        return "float32", {}
    trial = copy.deepcopy(model).train()
    batch = to_device(batch, device)
    times: dict[str, list[float]] = {"float32": [], "bfloat16": []}

    def run(dtype: str) -> None:
        with autocast(device, dtype):
            loss = sum(objective.losses(trial, batch).values())
        loss.backward()

    with keep_random_state(device):
        for done in range(1, MOST + 1):
            for dtype, taken in times.items():
                taken.append(_seconds(lambda dtype=dtype: run(dtype), device))
            best = {dtype: min(taken[1:] or taken) for dtype, taken in times.items()}
            behind = max(best.values()) > CLEARLY * min(best.values())
            spent = sum(map(sum, times.values()))
            if (done >= FEWEST and (behind or spent > seconds)) or (behind and spent > seconds):
                break
    return min(best, key=best.__getitem__), best
