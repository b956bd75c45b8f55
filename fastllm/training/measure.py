"""What this device can do, measured when a run starts: matrix rate and the faster precision."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast for ``dtype`` "bfloat16"; does nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def matmul_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of the best of a few square products in ``dtype``: what MFU is measured against."""
    n = 8192 if device.type == "cuda" else 2048 if dtype == "bfloat16" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / min(_seconds(lambda: a @ b, device, 5))


def step_seconds(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], dtype: str, repeats: int = 3) -> float:
    """Median time of a forward and a backward pass in ``dtype``, on a copy of ``model``."""
    trial = copy.deepcopy(model).train()
    tokens, targets = batch
    device = tokens.device

    def run():
        with autocast(device, dtype):
            loss = trial.loss(tokens, targets)
        loss.backward()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return statistics.median(_seconds(run, device, repeats))


def faster_dtype(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[str, dict[str, float]]:
    """The precision that trains ``model`` faster on ``batch``, and the seconds that each took."""
    times = {dtype: step_seconds(model, batch, dtype) for dtype in ("float32", "bfloat16")}
    return min(times, key=times.__getitem__), times
