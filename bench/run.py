"""``fastllm bench``: what each op is worth on this machine, beside eager PyTorch, torch.compile and its rivals.

For each op, shape and dtype, every provider first computes outputs and gradients, which must be as close to the truth
as a kernel of this library has to be (parity.py); one that is not, or fails, gets no time and a reason. Then forward,
backward and both are timed: providers take turns, on CUDA with the L2 cache overwritten before each call, and what
matrix products bound also with a hot one. GB/s and TFLOP/s are the op's least bytes and operations over the median,
beside the copy bandwidth and the matrix rate measured at the start.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch

from .. import cpu
from ..backends import backend, pick
from ..registry import Cost, Op, Sample
from ..time_limit import OutOfTime, time_limit
from . import cases
from .cases import calls_of, first_calls
from .left_running import none_left_running
from .parity import Judge
from .results import COMPILED, EAGER, NOT_COMPILED, NOT_INSTALLED, OURS, Row, Run, matrix_rate
from .rival import Rival, first_line, settled
from .timing import Quartiles, Timer, host_seconds, interleaved

DIRECTIONS = ("forward", "backward", "both")
# Largest call, in bytes of its tensors, that is run: a CPU takes seconds for more, and its gradients as much again.
LARGEST = {"cpu": 1 << 29, "cuda": 1 << 35}
ROUNDS = {"cpu": 15, "cuda": 100}
# Seconds, and share of what is left of the budget, the larger of which one case may take. On two AVX2 cores three cases
# of 40 s took as long as 35 small ones.
CASE, CASE_SHARE = {"cpu": 9.0, "cuda": 40.0}, {"cpu": 0.06, "cuda": 0.25}
# Share of it that a rival may take before it is timed, compilation included.
RIVAL_SHARE = 0.4
# Share of the budget that torch.compile may take to compile on a device. On two cores it takes 3 s a call, more than
# all else about a call that is not large.
COMPILING = {"cpu": 0.15, "cuda": 1.0}
# Least forward and backward passes of a case: parity's and the fewest samples of ours, eager and torch.compile.
PASSES = 30
# On a GPU, calls shorter than this are also timed on the host, whose work a longer one would hide.
LAUNCH_BOUND = 1e-3


def providers(op: Op) -> dict[str, Callable[[], Callable]]:
    """Name -> what sets that provider up and returns a function that takes the op's arguments."""

    def eager(*args, **kwargs):
        with backend("eager"):
            return op.function(*args, **kwargs)

    def compiled():
        torch._dynamo.reset()
        function = cpu.compiled(op.function, dynamic=False)

        def call(*args, **kwargs):
            with backend("eager"):
                return function(*args, **kwargs)

        return call

    return {OURS: lambda: op.function, EAGER: lambda: eager, COMPILED: compiled, **cases.rivals_of(op.name)}


@dataclass
class Compiling:
    """The seconds that torch.compile may still take, over all calls of a run, until it has been judged."""

    left: float = math.inf

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Takes off what the block lasts."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.left -= time.monotonic() - began


@dataclass(frozen=True)
class Effort:
    """What the measuring of one call may take.

    Attributes:
        rounds: samples of each provider; fewer, but at least ``timing.FEWEST``, where they would take longer than
            ``within`` seconds.
        left: seconds that it must not exceed; a call whose first run says that it would raises OutOfTime.
        compiling: what torch.compile may take; by default all that it wants.
        balance: FLOPs a byte above which matrix products bound a call: on CUDA it is timed with a hot cache too.
        rivals: those in processes of their own.
    """

    rounds: int
    within: float = math.inf
    left: float = math.inf
    balance: float = math.inf
    compiling: Compiling = field(default_factory=Compiling)
    rivals: Sequence[Rival] = ()


class Entrants(NamedTuple):
    """The providers of one call that are right, how long their first calls took, and what is wrong with the others."""

    functions: dict[str, Callable]
    first: dict[str, dict[str, float]]
    problems: dict[str, str]


def entered(
    op: Op, sample: Sample, dtype: torch.dtype, device: torch.device, effort: Effort, only: Collection[str] = ()
) -> Entrants:
    """Sets up every provider, and judges its first call and those of ``effort.rivals``.

    Args:
        only: providers to take beside ours and eager; all if empty.

    Raises:
        OutOfTime: ours or eager PyTorch takes longer than there is.
    """
    found = Entrants({}, {}, {})
    judge = None
    # Eager comes first: its error is the yardstick. Where it fails, that of the reference in the same dtype is.
    for name, setup in sorted(providers(op).items(), key=lambda item: item[0] != EAGER):
        if only and name not in (OURS, EAGER, *only):
            continue
        if name == COMPILED and effort.compiling.left <= 0:
            found.problems[name] = NOT_COMPILED
            continue
        spending = effort.compiling.spending() if name == COMPILED else contextlib.nullcontext()
        try:
            limit = math.inf if name in (OURS, EAGER) else RIVAL_SHARE * effort.left
            with spending, none_left_running(), time_limit(limit):
                function = setup()
                found.first[name] = first_calls(function, sample, device)
                once = found.first[name].get("both", found.first[name]["forward"])
                if name == EAGER and PASSES * once > effort.left:
                    raise OutOfTime(f"a call takes {once:.1f} s, {effort.left:.0f} s are left")
                judge = judge or Judge(op, function if name == EAGER else op.reference, sample, dtype)
                problem = judge.problem(function)
        except OutOfTime as error:
            if name in (OURS, EAGER):
                raise
            problem = str(error)
        except ModuleNotFoundError as error:
            problem = f"{NOT_INSTALLED} ({error.name})"
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            found.functions[name] = function
        else:
            found.problems[name] = problem
    for rival in effort.rivals:
        try:
            with none_left_running(), time_limit(RIVAL_SHARE * effort.left):
                rival.enter(judge or Judge(op, op.reference, sample, dtype))
        except OutOfTime as error:
            rival.problem = str(error)
        found.first[rival.name] = rival.first
    return found


def _least(cost: Cost, direction: str) -> tuple[int, int]:
    """(bytes, FLOPs) of a direction."""
    ways = ("forward", "backward") if direction == "both" else (direction,)
    return sum(getattr(cost, f"{way}_bytes") for way in ways), sum(getattr(cost, f"{way}_flops") for way in ways)


def _floor(cost: Cost, rates: dict[str, float], dtype: str) -> float:
    """Seconds that a forward and a backward take at least."""
    least, flops = _least(cost, "both")
    return max(least / rates["copy"], flops / matrix_rate(rates, dtype))


def measure(
    op: Op, sample: Sample, dtype: str, device: torch.device, effort: Effort, only: Collection[str] = (), **sweep
) -> Iterator[Row]:
    """The rows of one call: parity of each provider, then the times of those that have it.

    Args:
        only: providers to take beside ours and eager; all if empty.
        sweep: ``axis`` and ``size`` of the rows.
    """
    began = time.monotonic()
    cost = op.cost(*sample.args, **sample.kwargs)
    entrants = entered(op, sample, getattr(torch, dtype), device, effort, only)
    common: dict[str, Any] = dict(op=op.name, shape=sample.name, dtype=dtype, **sweep)
    directions = DIRECTIONS if cases.differentiable(sample) else DIRECTIONS[:1]
    states = {}
    for direction in directions:
        least, flops = _least(cost, direction)
        gemm_bound = flops > effort.balance * least
        states[direction] = ["hot"] if device.type != "cuda" else ["cold", "hot"] if gemm_bound else ["cold"]
    turns = [(direction, cache) for direction in directions for cache in states[direction]]
    for at, (direction, cache) in enumerate(turns):
        common |= dict(direction=direction, cache=cache)
        for name, problem in entrants.problems.items():
            yield Row(**common, provider=name, problem=problem)
        if not entrants.functions:
            continue
        calls = calls_of(entrants.functions, sample, direction)
        timer = Timer(device, cache == "cold")
        timer.calibrate(next(iter(calls.values())), device)
        share = (effort.within - (time.monotonic() - began)) / (len(turns) - at)
        for rival in effort.rivals:
            rival.prepare(direction, cache == "cold")
        calls |= {rival.name: rival for rival in effort.rivals if rival.problem is None}
        clock = settled(timer) if effort.rivals else timer
        samples = interleaved(calls, effort.rounds, device, timer=clock, within=share)
        least, flops = _least(cost, direction)
        for name, times in samples.items():
            call = calls[name]
            if isinstance(call, Rival):
                peak, waits = call.outcome()
                if call.problem is not None:
                    continue
            else:
                peak, waits = timer.peaks.get(name), name in timer.behind
            brief = device.type == "cuda" and Quartiles.of(times).median < LAUNCH_BOUND
            host = [] if not brief else call.host() if isinstance(call, Rival) else host_seconds(call, device)
            yield Row(
                **common, provider=name, samples=times, least_bytes=least, flops=flops,
                first_call=entrants.first[name].get(direction), peak_bytes=peak, host=host, waits=waits,
            )  # fmt: skip
        for rival in effort.rivals:
            if rival.problem is not None:
                yield Row(**common, provider=rival.name, problem=rival.problem)


@dataclass(frozen=True)
class Planned:
    """A call to be run: ``make(device, dtype)`` gives its sample; ``axis`` and ``size`` where it is part of a sweep."""

    op: Op
    name: str
    make: Callable[[torch.device, torch.dtype], Sample]
    axis: str | None = None
    size: int | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors in float32."""
        return cases.held_bytes(self.make(torch.device("meta"), torch.float32))


def set_up_compiler(device: torch.device) -> None:
    """torch.compile's first use, which loads it and builds what all later ones share: seconds that no call's are."""
    # Where it cannot compile, each call's row says why.
    with contextlib.suppress(Exception):
        cpu.compiled(lambda x: x + 1)(torch.ones(8, device=device))


def plan(ops: list[Op], shape: list[str], sweep: bool = False, device: str = "cuda") -> list[Planned]:
    """What to run: the first shape of every op, then the second of every op, and so on; then the sweeps alike.

    On a CPU those that were chosen for CPUs come first, then all others from small to large: time is short there.
    """

    def columns(calls):
        found = [[planned for planned in calls(op) if any(part in planned.name for part in shape)] for op in ops]
        return [planned for planned in chain.from_iterable(zip_longest(*found)) if planned is not None]

    def shapes(op):
        return [Planned(op, name, make) for name, make in cases.shapes_of(op.name, device).items()]

    def for_cpus(op):
        return shapes(op)[: len(cases.cpu_shapes_of(op.name))]

    def others(op):
        return shapes(op)[len(cases.cpu_shapes_of(op.name)) :]

    def swept(op):
        axis, calls = cases.sweep_of(op.name)
        return [Planned(op, f"{axis} {size}", make, axis, size) for size, make in calls.items()]

    if device == "cpu":
        found = columns(for_cpus) + sorted(columns(others), key=lambda planned: planned.held_bytes)
    else:
        found = columns(shapes)
    return found + (columns(swept) if sweep else [])


@dataclass(frozen=True)
class Request:
    """What a run asks of every call.

    Attributes:
        dtypes: the precisions; each call is taken in all of them.
        rounds: samples of each provider.
        budget: seconds for everything. Each case has an equal share of what is left of it, takes fewer samples rather
            than more time, and is stopped where it takes the time of many others.
        only: providers to take beside ours and eager; all if empty.
        compiled: the names of the ops that torch.compile serves too; all if None.
        rivals: providers in processes of their own.
    """

    dtypes: Sequence[str]
    rounds: int
    budget: float
    only: Collection[str] = ()
    compiled: Container[str] | None = None
    rivals: Sequence[Rival] = ()

    def compiles(self, op: Op) -> bool:
        """Whether torch.compile is a provider of ``op``."""
        return (not self.only or COMPILED in self.only) and (self.compiled is None or op.name in self.compiled)

    def providers_of(self, op: Op) -> Collection[str]:
        """Those among ``only`` that serve ``op``; none named means all."""
        if self.compiled is None or op.name in self.compiled:
            return self.only
        return [OURS, *(name for name in self.only or providers(op) if name != COMPILED)]


def run(
    planned: list[Planned],
    device: torch.device,
    request: Request,
    *,
    environment: dict | None = None,
    tell: Callable[[str], None] = print,
    keep: Callable[[Run], None] = lambda run: None,
) -> Run:
    """All rows, and what was left out and why.

    ``environment`` may have the device's ``rates``. ``tell`` is given a line before every case, ``keep`` what there is
    after it.
    """
    # Some calls import it. An import that a time limit stops leaves a module that cannot be used.
    importlib.import_module("torch._dynamo")
    found = Run(environment or {})
    rates = found.environment.get("rates")
    end = time.monotonic() + request.budget
    compiling = Compiling(COMPILING[device.type] * request.budget)
    todo = [(case, dtype) for case in planned for dtype in request.dtypes]
    if any(request.compiles(case.op) for case, _ in todo):
        with compiling.spending():
            set_up_compiler(device)
    for i, (case, dtype) in enumerate(todo):
        what = f"{case.op.name}, {case.name}, {dtype}"
        left = end - time.monotonic()
        if left <= 0:
            found.left_out.append(f"{what}: the budget of {request.budget:g} s was spent")
            continue
        call = case.make(torch.device("meta"), getattr(torch, dtype))
        if cases.held_bytes(call) > LARGEST[device.type]:
            found.left_out.append(f"{what}: too large for this device")
            continue
        torch.manual_seed(0)
        try:
            call = replace(case.make(device, getattr(torch, dtype)), name=case.name)
            limit = min(left, max(CASE[device.type], CASE_SHARE[device.type] * left))
            # An op's cost may depend on values, which meta tensors do not have.
            if rates and PASSES * _floor(case.op.cost(*call.args, **call.kwargs), rates, dtype) > limit:
                raise OutOfTime(f"takes longer than the {limit:.0f} s that a call may take")
            tell(f"{what} (fastllm serves it by {_serving(case.op, call)})")
            balance = matrix_rate(rates, dtype) / rates["copy"] if rates else math.inf
            effort = Effort(request.rounds, left / (len(todo) - i), limit, balance, compiling, request.rivals)
            for rival in request.rivals:
                rival.start()
            chosen, sweep = request.providers_of(case.op), dict(axis=case.axis, size=case.size)
            with none_left_running(), time_limit(limit):
                for row in measure(case.op, call, dtype, device, effort, chosen, **sweep):
                    found.rows.append(row)
        except OutOfTime as error:
            found.left_out.append(f"{what}: {error}")
        except Exception as error:  # what it was is in the results; the other cases go on
            found.left_out.append(f"{what}: {first_line(error)}")
        keep(found)
    return found


def _serving(op: Op, call: Sample) -> str:
    return pick(op.name, op.call(*call.args, **call.kwargs)).backend
