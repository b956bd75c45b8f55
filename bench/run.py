"""``fastllm bench``: what each op is worth on this machine, beside eager PyTorch, torch.compile and its rivals.

For each op, shape and dtype, every provider first computes outputs and gradients, which must be as close to the truth
as a kernel of this library has to be (parity.py); one that is not, or fails, gets no time and a reason. Then forward,
backward and both are timed: providers take turns, on CUDA with the L2 cache overwritten before each call. GB/s and
TFLOP/s are the op's least bytes and operations over the median, beside the copy bandwidth and the matrix rate
measured at the start.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import chain, zip_longest
from pathlib import Path

import torch

from ..registry import Op, Sample, backend, pick
from . import cases
from .environment import environment
from .parity import Judge, upstream
from .timing import Quartiles, copy_bandwidth, interleaved, matrix_rate, synchronize

OURS, EAGER, COMPILED = "fastllm", "eager", "torch.compile"
NOT_INSTALLED = "not installed"
DIRECTIONS = ("forward", "backward", "both")
DTYPES = ("bfloat16", "float16", "float32")
# Largest call, in bytes of its tensors, that is run: a CPU takes seconds for more, and its gradients as much again.
LARGEST = {"cpu": 1 << 29, "cuda": 1 << 35}
ROUNDS = {"cpu": 15, "cuda": 100}
# A sample lasts at least this long on a CPU, by repetition: the clock and the loop around it cost about 1 us.
SHORTEST = 2e-4


@dataclass(frozen=True)
class Row:
    """One provider in one direction of one call. Seconds and bytes; ``problem`` says why there are no samples."""

    op: str
    shape: str
    dtype: str
    direction: str
    provider: str
    problem: str | None = None
    samples: list[float] = field(default_factory=list)
    least_bytes: int = 0
    flops: int = 0
    first_call: float | None = None
    peak_bytes: int | None = None

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.direction

    @property
    def seconds(self) -> Quartiles:
        return Quartiles.of(self.samples)


def providers(op: Op) -> dict[str, Callable[[], Callable]]:
    """Name -> what sets that provider up and returns a function that takes the op's arguments."""

    def eager(*args, **kwargs):
        with backend("eager"):
            return op.function(*args, **kwargs)

    def compiled():
        torch._dynamo.reset()
        function = torch.compile(op.function, dynamic=False)

        def call(*args, **kwargs):
            with backend("eager"):
                return function(*args, **kwargs)

        return call

    return {OURS: lambda: op.function, EAGER: lambda: eager, COMPILED: compiled, **cases.rivals_of(op.name)}


@dataclass(frozen=True)
class Call:
    """What one provider does in one direction: ``run(prepare())``, of which ``run`` is timed."""

    provider: str
    prepare: Callable[[], object]
    run: Callable[[object], object]


class Timer:
    """``timer(call, device)`` -> seconds of one ``call.run``, for :func:`.timing.interleaved`."""

    def __init__(self, device: torch.device):
        self.peaks: dict[str, int] = {}
        self.repeats = 1
        self.flush = None
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * l2, dtype=torch.int8, device=device)

    def calibrate(self, call: Call, device: torch.device) -> None:
        """Choose how often a sample repeats its call; on CUDA once, since the cache is flushed before each."""
        if self.flush is None:
            once = min(self(call, device) for _ in range(3))
            self.repeats = max(1, int(SHORTEST / max(once, 1e-7)))

    def __call__(self, call: Call, device: torch.device) -> float:
        ready = [call.prepare() for _ in range(self.repeats)]
        if self.flush is None:
            start = time.perf_counter()
            for argument in ready:
                call.run(argument)
            return (time.perf_counter() - start) / self.repeats
        torch.cuda.reset_peak_memory_stats(device)
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call.run(ready[0])
        end.record()
        synchronize(device)
        held = torch.cuda.max_memory_allocated(device) - self.flush.numel()
        self.peaks[call.provider] = max(self.peaks.get(call.provider, 0), held)
        return start.elapsed_time(end) * 1e-3


def _calls(functions: dict[str, Callable], sample: Sample, direction: str) -> dict[str, Call]:
    """Each provider's work in one direction. A backward has its own forward's graph, made before the clock starts."""
    leaves = cases.differentiable(sample)
    grads = upstream(cases.forward(next(iter(functions.values())), sample))

    def call(name: str) -> Call:
        function = functions[name]

        def forward(_=None):
            return cases.forward(function, sample)

        def backward(outputs):
            return cases.backward(outputs, leaves, grads)

        if direction == "forward":
            return Call(name, lambda: None, forward)
        if direction == "backward":
            return Call(name, forward, backward)
        return Call(name, lambda: None, lambda _: backward(forward()))

    return {name: call(name) for name in functions}


def measure(
    op: Op, sample: Sample, dtype: str, device: torch.device, rounds: int, only=(), within: float = math.inf
) -> Iterator[Row]:
    """The rows of one call: parity of each provider, then the times of those that have it.

    Args:
        rounds: samples of each provider; fewer, but at least ``timing.FEWEST``, where they would take longer than
            ``within`` seconds.
        only: providers to take beside ours and eager; all if empty.
    """
    began = time.monotonic()
    cost = op.cost(*sample.args, **sample.kwargs)
    functions: dict[str, Callable] = {}
    first: dict[str, float] = {}
    problems: dict[str, str] = {}
    judge = None
    # Eager comes first: its error is the yardstick. Where it fails, that of the reference in the same dtype is.
    for name, setup in sorted(providers(op).items(), key=lambda item: item[0] != EAGER):
        if only and name not in (OURS, EAGER, *only):
            continue
        try:
            function = setup()
            start = time.perf_counter()
            cases.forward(function, sample)
            synchronize(device)
            first[name] = time.perf_counter() - start
            yardstick = function if name == EAGER else op.reference
            judge = judge or Judge(op, yardstick, sample, getattr(torch, dtype))
            problem = judge.problem(function)
        except ModuleNotFoundError as error:
            problem = f"{NOT_INSTALLED} ({error.name})"
        except Exception as error:
            problem = _first_line(error)
        if problem is None:
            functions[name] = function
        else:
            problems[name] = problem
    judge = None
    common = dict(op=op.name, shape=sample.name, dtype=dtype)
    directions = DIRECTIONS if cases.differentiable(sample) else DIRECTIONS[:1]
    for direction in directions:
        least = (cost.forward_bytes, cost.backward_bytes, cost.forward_bytes + cost.backward_bytes)
        flops = (cost.forward_flops, cost.backward_flops, cost.forward_flops + cost.backward_flops)
        at = DIRECTIONS.index(direction)
        for name, problem in problems.items():
            yield Row(**common, direction=direction, provider=name, problem=problem)
        if not functions:
            continue
        calls = _calls(functions, sample, direction)
        timer = Timer(device)
        timer.calibrate(next(iter(calls.values())), device)
        share = (within - (time.monotonic() - began)) / (len(directions) - at)
        samples = interleaved(calls, rounds, device, timer=timer, within=share)
        for name, times in samples.items():
            yield Row(
                **common, direction=direction, provider=name, samples=times, least_bytes=least[at], flops=flops[at],
                first_call=first[name], peak_bytes=timer.peaks.get(name),
            )  # fmt: skip


def plan(ops: list[Op], shape: list[str]) -> list[tuple[Op, str]]:
    """(op, shape) to run: the first shape of every op, then the second of every op, and so on."""
    columns = [[(op, name) for name in cases.shapes_of(op.name) if any(part in name for part in shape)] for op in ops]
    return [case for case in chain.from_iterable(zip_longest(*columns)) if case is not None]


def run(
    ops: list[Op],
    device: torch.device,
    *,
    dtypes: list[str],
    shape: list[str],
    rounds: int,
    budget: float,
    only=(),
    tell: Callable[[str], None] = print,
    keep: Callable[[list[Row], list[str]], None] = lambda rows, left_out: None,
) -> tuple[list[Row], list[str]]:
    """All rows, and what was left out and why.

    Each case has an equal share of what is left of ``budget`` seconds; it takes fewer samples rather than more time.
    ``keep`` is given what there is after every case.
    """
    rows: list[Row] = []
    left_out: list[str] = []
    end = time.monotonic() + budget
    planned = [(op, name, dtype) for op, name in plan(ops, shape) for dtype in dtypes]
    for i, (op, name, dtype) in enumerate(planned):
        what = f"{op.name}, {name}, {dtype}"
        left = end - time.monotonic()
        if left <= 0:
            left_out.append(f"{what}: the budget of {budget:g} s was spent")
            continue
        make = cases.shapes_of(op.name)[name]
        if cases.held_bytes(make(torch.device("meta"), getattr(torch, dtype))) > LARGEST[device.type]:
            left_out.append(f"{what}: too large for this device")
            continue
        torch.manual_seed(0)
        try:
            call = replace(make(device, getattr(torch, dtype)), name=name)
            tell(f"{what} (fastllm serves it by {_serving(op, call)})")
            rows.extend(measure(op, call, dtype, device, rounds, only, left / (len(planned) - i)))
        except Exception as error:  # what it was is in the results; the other cases go on
            left_out.append(f"{what}: {_first_line(error)}")
        keep(rows, left_out)
    return rows, left_out


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _serving(op: Op, call: Sample) -> str:
    tensors = cases.tensors_of(call)
    return pick(op.name, *(t for t in tensors if t.is_floating_point()))


def results_json(rows: list[Row], left_out: list[str], found: dict) -> str:
    """What ``fastllm bench`` writes: the environment, every sample, and what is missing."""
    return json.dumps({"environment": found, "left_out": left_out, "rows": [asdict(row) for row in rows]}, indent=1)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        from . import train

        train.main(argv[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="fastllm bench",
        description="Time the ops, compare two runs, or time the training step (fastllm bench train --help).",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (all); or: compare A.json B.json; or: train")
    parser.add_argument("--static", action="store_true", help="what is known without running: compiled kernels, model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="(bfloat16)")
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--provider", nargs="+", default=[], help="beside fastllm and eager, only these")
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="(%(default)g)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for bench.json (default: runs/bench-<time>)")
    options = parser.parse_args(argv)
    if options.ops[:1] == ["compare"]:
        if len(options.ops) != 3:
            parser.error("compare: expected two files")
        from .report import compare

        try:
            compare(*map(Path, options.ops[1:]))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"compare: {error}")
        return 0
    try:
        ops = cases.selected(options.ops)
    except ValueError as error:
        parser.error(str(error))
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    if options.budget <= 0:
        parser.error(f"--budget: expected a positive number of seconds, got {options.budget:g}")
    if options.static:
        from .static import both_tables

        both_tables([op.name for op in ops], options.shape)
        return 0
    device = torch.device(options.device)
    rounds = options.rounds or ROUNDS[device.type]
    rates = {"copy": copy_bandwidth(device), "matrix": matrix_rate(device, torch.bfloat16)}
    found = {**environment(device), "rates": rates}
    folder = options.out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"

    def keep(rows, left_out):
        file.write_text(results_json(rows, left_out, found))

    rows, left_out = run(
        ops, device, dtypes=options.dtype, shape=options.shape, rounds=rounds, budget=options.budget,
        only=options.provider, keep=keep,
    )  # fmt: skip
    keep(rows, left_out)
    try:
        from .report import show
    except ModuleNotFoundError as error:
        print(f"no table: the package {error.name} is not installed")
    else:
        show(rows, left_out, found)
    print(f"written: {file}")
    return 0 if rows or left_out else 1


if __name__ == "__main__":
    raise SystemExit(main())
