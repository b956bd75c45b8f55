"""Timing several things that do the same, in turns, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..timing import seconds, synchronize

# What a timer returns: seconds, or several times of one call.
Times = TypeVar("Times")
FEWEST = 3
# mallopt's parameters in glibc: how many blocks are mapped on their own, and how much is free before some goes back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
# A sample lasts at least this long on a CPU, by repetition: the clock and the loop around it cost about 1 us.
SHORTEST = 2e-4
# Calls that the host queues at once: a few kernels each, far below the 1024 launches after which CUDA makes it wait.
QUEUED = 20
# Cycles that a GPU waits before a sample, so that the host has queued all of it before the GPU begins: 50 us at 2 GHz
# to begin with, twice as many wherever that was too short, at most 0.1 s. Guesses: no GPU has run them yet.
WAIT, LONGEST_WAIT = 100_000, 200_000_000


@dataclass(frozen=True)
class Quartiles:
    """The median of some samples and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quartiles:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, median, high)


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed for what is allocated next, from here on; whether it can.

    glibc gives a large block back at once, and the kernel zeroes the pages of the next one: of 40 layer norms of
    8192 x 1600 in fp32 that took 1.7 of 2.5 s, the same for every provider.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no handle of the process itself
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(seconds(lambda: target.copy_(source), device) for _ in range(6))


def order(names: Iterable[str], round_: int) -> list[str]:
    """Who comes first in one round comes last in the next."""
    return list(names)[:: 1 if round_ % 2 == 0 else -1]


def interleaved(
    runs: Mapping[str, Any],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    timer: Callable[[Any, torch.device], Times] = seconds,
    within: float = math.inf,
) -> dict[str, list[Times]]:
    """The time of each of ``runs``, once a round, in the order of :func:`order`.

    Args:
        rounds: how many, unless time runs out.
        warmup: rounds before those that count.
        timer: ``timer(run, device)`` -> the time of one of ``runs``, as a rule in seconds.
        within: seconds after which no round begins, once FEWEST are done.
    """
    samples: dict[str, list[Times]] = {name: [] for name in runs}
    start = time.monotonic()
    for round_ in range(-warmup, rounds):
        if round_ >= FEWEST and time.monotonic() - start > within:
            break
        for name in order(runs, round_):
            elapsed = timer(runs[name], device)
            if round_ >= 0:
                samples[name].append(elapsed)
    return samples


def ratios(samples: Mapping[str, Sequence[float]], name: str, baseline: str) -> Quartiles:
    """How many times as fast ``name`` is as ``baseline``: quartiles of the ratios within each round."""
    return Quartiles.of([b / a for a, b in zip(samples[name], samples[baseline], strict=True)])


@dataclass(frozen=True)
class Workload:
    """What one provider does in one direction: ``run(prepare())``. Only ``run`` is timed."""

    provider: str
    prepare: Callable[[], object]
    run: Callable[[object], object]


class Timer:
    """``timer(call, device)`` -> seconds of one ``call.run``, for :func:`interleaved`.

    On CUDA it is the device's time alone: the GPU waits until the host has queued the whole call, so that no kernel
    waits for its launch. ``cold`` overwrites the L2 cache before each sample; hot, the same call has run just before.
    ``behind`` has the providers of which that was not possible, since they wait for the device themselves: their time
    is the host's too. A CPU has no such switch: a sample repeats its call, and is hot.
    """

    def __init__(self, device: torch.device, cold: bool):
        self.peaks: dict[str, int] = {}
        self.waits: dict[str, int] = {}
        self.behind: set[str] = set()
        self.repeats = 1
        self.flush = None
        if cold:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * l2, dtype=torch.int8, device=device)

    def calibrate(self, call: Workload, device: torch.device) -> None:
        """Choose how often a sample on a CPU repeats its call."""
        if device.type != "cuda":
            once = min(self(call, device) for _ in range(3))
            self.repeats = max(1, int(SHORTEST / max(once, 1e-7)))

    def __call__(self, call: Workload, device: torch.device) -> float:
        if device.type == "cuda":
            return self._on_cuda(call, device)
        ready = [call.prepare() for _ in range(self.repeats)]
        start = time.perf_counter()
        for argument in ready:
            call.run(argument)
        return (time.perf_counter() - start) / self.repeats

    def _on_cuda(self, call: Workload, device: torch.device) -> float:
        while True:
            elapsed, ahead = self._sample(call, device)
            if ahead or call.provider in self.behind:
                return elapsed
            self.waits[call.provider] *= 2
            if self.waits[call.provider] > LONGEST_WAIT:
                self.behind.add(call.provider)
                self.waits[call.provider] = WAIT

    def _sample(self, call: Workload, device: torch.device) -> tuple[float, bool]:
        """Seconds on the device, and whether the host had queued all before the device began."""
        ready = call.prepare()
        if self.flush is None:
            call.run(call.prepare())
        else:
            self.flush.zero_()
        torch.cuda.reset_peak_memory_stats(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.waits.setdefault(call.provider, WAIT))
        start.record()
        call.run(ready)
        end.record()
        ahead = not start.query()
        synchronize(device)
        held = torch.cuda.max_memory_allocated(device) - (0 if self.flush is None else self.flush.numel())
        self.peaks[call.provider] = max(self.peaks.get(call.provider, 0), held)
        return start.elapsed_time(end) * 1e-3, ahead


def host_seconds(call: Workload, device: torch.device, samples: int = 9) -> list[float]:
    """Seconds that the host spends on one call: QUEUED of them are launched, and the device is not waited for."""
    found = []
    for _ in range(samples):
        ready = [call.prepare() for _ in range(QUEUED)]
        synchronize(device)
        start = time.perf_counter()
        for argument in ready:
            call.run(argument)
        found.append((time.perf_counter() - start) / QUEUED)
        synchronize(device)
    return found
