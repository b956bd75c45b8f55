"""What this device can do, measured when a run starts: matrix rate and the faster precision."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

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


def matmul_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of the best of a few square products in ``dtype``: what MFU is measured against."""
    n = 8192 if device.type == "cuda" else 2048 if dtype == "bfloat16" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / min(_seconds(lambda: a @ b, device) for _ in range(6))


def faster_dtype(
    objective: Objective, model: nn.Module, batch: Batch, seconds: float = 3.0
) -> tuple[str, dict[str, float]]:
    """The precision in which a forward and a backward pass on ``batch`` take less time, and the seconds of each.

    On a copy of ``model``, for about so many ``seconds``, but at least 3 and at most 20 rounds. The two take turns and
    the shortest time counts, so that other work on the machine disturbs the choice as little as possible. ``model``
    and torch's random state stay as they are.
    """
    trial = copy.deepcopy(model).train()
    device = next(trial.parameters()).device
    batch = to_device(batch, device)
    times: dict[str, list[float]] = {"float32": [], "bfloat16": []}

    def run(dtype: str) -> None:
        with autocast(device, dtype):
            loss = sum(objective.losses(trial, batch).values())
        loss.backward()

    with keep_random_state(device):
        # The first round sets things up and does not count.
        while len(times["bfloat16"]) < 4 or (len(times["bfloat16"]) < 21 and sum(map(sum, times.values())) < seconds):
            for dtype, taken in times.items():
                taken.append(_seconds(lambda dtype=dtype: run(dtype), device))
    best = {dtype: min(taken[1:]) for dtype, taken in times.items()}
    return min(best, key=best.__getitem__), best
