"""The matrix rate of a device: what MFU and rooflines are measured against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import cpu
from .timing import seconds

# Sizes of the square products: they double up to a CPU's largest, as far as time allows. A GPU takes one size at once.
# All sizes, and how many products of the last one count, are guesses.
SMALLEST = 128
MAX_SIZE = {torch.float32: 1024, torch.float64: 1024}  # 16-bit products are several times as fast and need 2048
GPU_SIZE = 8192
PRODUCTS = 6


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def _unshared(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call as the clock has them, and as they would be if other work left this process its cores.

    On a CPU the second is the processor time over torch's threads, and at least that of the thread that calls: threads
    that wait for a core take none, and a product that PyTorch has no threads for, as of bfloat16 on a CPU without such
    products, is all in the one that calls. Where a thread spins while it waits for one that has no core, that counts as
    work, so the second is never too short for it.
    """
    all_threads, this_one = time.process_time(), time.thread_time()
    wall = seconds(run, device)
    if device.type != "cpu":
        return wall, wall
    worked = max((time.process_time() - all_threads) / torch.get_num_threads(), time.thread_time() - this_one)
    return wall, min(wall, worked)


def matmul_flops(device: torch.device, dtype: torch.dtype, within: float = 1.0) -> float:
    """FLOP/s of square products of random matrices in ``dtype``: the best of a few of the largest size that was taken.

    On a CPU it is the rate of cores that no other work takes, so that what is measured against it beside less work than
    now cannot exceed it.

    On a CPU about ``within`` seconds at most: the size doubles while two products of the next, at eight times the work,
    fit into what is left. A CPU without products of ``dtype`` (:func:`fastllm.cpu.multiplies`) stops at small ones.
    """
    end = time.perf_counter() + within
    largest = GPU_SIZE if device.type == "cuda" else MAX_SIZE.get(dtype, 2048)
    if device.type == "cpu" and not cpu.multiplies(dtype):
        largest = 2 * SMALLEST  # 40 ms at 0.9 GFLOP/s; smaller ones are faster than what a model has
    n = largest if device.type == "cuda" else SMALLEST
    generator = torch.Generator(device).manual_seed(0)
    while True:
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
        seconds(lambda a=a, b=b: _product(a, b), device)
        wall, best = _unshared(lambda a=a, b=b: _product(a, b), device)
        if n >= largest or time.perf_counter() + 2 * 8 * wall > end:
            break
        n *= 2
    for _ in range(PRODUCTS - 2):
        if device.type == "cpu" and time.perf_counter() + wall > end:
            break
        again, unshared = _unshared(lambda: _product(a, b), device)
        wall, best = min(wall, again), min(best, unshared)
    return 2 * n**3 / best
