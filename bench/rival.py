"""Anybody's function as a provider of one op, in a process of its own: ``fastllm bench OP --rival MODULE:FUNCTION``.

The function takes the op's arguments and returns what the op returns. Its process imports it, so whatever it changes in
PyTorch changes nobody else's results or times, and a crash of it ends nothing else. Inputs and results pass through
files. The results are judged here, by the rule that every provider keeps (parity.py).

Providers still take turns. Threads of the process that was busy before may spin for a while, so every turn of such a
run begins with a pause and a call that is not timed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ..registry import Op, Sample
from .cases import calls_of, first_calls
from .module_files import module_of
from .parity import Judge, results
from .timing import Timer, Workload, host_seconds, keep_freed_memory

# Seconds before a turn. OpenMP's threads spin for a few ms after their last work in GCC's runtime; a guess for others.
SETTLE = 0.01


class Refused(ValueError):
    """A rival that cannot be a provider of this op, and why."""


def settled(timer: Timer) -> Callable[[Workload | Rival, torch.device], float]:
    """``timer`` where rivals take turns with calls of this process."""

    def seconds(call: Workload | Rival, device: torch.device) -> float:
        time.sleep(SETTLE)
        if isinstance(call, Rival):
            return call.seconds()
        call.run(call.prepare())
        return timer(call, device)

    return seconds


class Rival:
    """One function and its process. ``problem``: why it has no time in the present call, or None.

    Args:
        target: ``module:function``, where the module is looked for in the present folder too; or ``file.py:function``.
        device: where it is timed.

    Raises:
        Refused: ``target`` has another form.
    """

    def __init__(self, target: str, device: torch.device):
        module, _, function = target.rpartition(":")
        if not module or not function:
            raise Refused(f"--rival: expected module:function or file.py:function, got {target!r}")
        self.name, self.device = target, device
        self.problem: str | None = None
        self.first: dict[str, float] = {}
        self._started: tuple[BaseProcess, Any] | None = None

    def check(self, op: Op, samples: Sequence[Sample]) -> None:
        """Starts the process and imports the function.

        Raises:
            Refused: it cannot be imported, is no function, or takes none of the calls ``samples``.
        """
        problems = [self._asked("fits", len(sample.args), list(sample.kwargs)) for sample in samples]
        if all(problems):
            takes = inspect.signature(op.function)
            raise Refused(f"--rival {self.name}: {problems[0]}; {op.name} takes {takes}")

    def enter(self, judge: Judge) -> None:
        """First calls and parity; afterwards ``problem`` says whether it may be timed."""
        sample, self.problem = judge.sample, None
        try:
            self.problem = self._asked("fits", len(sample.args), list(sample.kwargs))
            if self.problem is None:
                with tempfile.TemporaryDirectory(prefix="fastllm-rival-") as folder:
                    inputs, outputs = f"{folder}/inputs.pt", f"{folder}/outputs.pt"
                    torch.save((sample.args, dict(sample.kwargs)), inputs)
                    self.first = self._asked("run", inputs, outputs)
                    found = torch.load(outputs, map_location=self.device, weights_only=True)
                self.problem = judge.problem_of(found)
        except Refused as error:
            self.problem = str(error)

    def prepare(self, direction: str, cold: bool) -> None:
        """Makes ready for the turns of one direction."""
        self._unless_failed("prepare", direction, cold)

    def seconds(self) -> float:
        """The seconds of one turn; NaN once something has failed."""
        found = self._unless_failed("seconds")
        return math.nan if found is None else found

    def outcome(self) -> tuple[int | None, bool]:
        """Bytes of its peak on a GPU, and whether a call waits for the device itself."""
        return self._unless_failed("outcome") or (None, False)

    def host(self) -> list[float]:
        """Seconds that the host spends on a call."""
        return self._unless_failed("host") or []

    def stop(self) -> None:
        """Ends the process."""
        if self._started is not None:
            process, connection = self._started
            process.kill()
            process.join()
            connection.close()
            self._started = None

    def _unless_failed(self, what: str, *arguments):
        if self.problem is not None:
            return None
        try:
            return self._asked(what, *arguments)
        except Refused as error:
            self.problem = str(error)
            return None

    def start(self) -> None:
        """Starts the process, if there is none, and imports the function there.

        Raises:
            Refused: it cannot be imported.
        """
        self._running()

    def _running(self) -> tuple[BaseProcess, Any]:
        """The process and the connection to it."""
        if self._started is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            settings = (self.name, str(self.device), torch.get_num_threads())
            process = context.Process(target=serve, args=(theirs, *settings), daemon=True)
            process.start()
            self._started = process, ours
            theirs.close()
            self._answer(process, ours)
            return process, ours
        return self._started

    def _asked(self, what: str, *arguments):
        process, connection = self._running()
        connection.send((what, arguments))
        return self._answer(process, connection)

    def _answer(self, process: BaseProcess, connection):
        """The process's answer. Whatever else happens meanwhile, a time limit too, ends the process."""
        try:
            ok, value = connection.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            self.stop()
            named = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise Refused(f"its process {named}") from None
        except BaseException:
            self.stop()
            raise
        if not ok:
            self.stop()
            raise Refused(value)
        return value


def first_line(error: BaseException) -> str:
    """The error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def load(target: str) -> Callable:
    """The function that ``module:function`` or ``file.py:function`` names.

    Raises:
        Refused: there is none.
    """
    place, _, name = target.rpartition(":")
    sys.path.insert(0, os.getcwd())
    try:
        if place.endswith(".py"):
            file = Path(place).resolve()
            if not file.is_file():
                raise Refused(f"--rival: there is no file {place}")
            sys.path.insert(0, str(file.parent))
            module = module_of(file, f"fastllm_rival_{file.stem}")
        else:
            module = importlib.import_module(place)
        function = module
        for part in name.split("."):
            function = getattr(function, part)
    except Refused:
        raise
    except BaseException as error:  # whatever a module does at its import, sys.exit too
        raise Refused(f"--rival {target}: {first_line(error)}") from error
    if not callable(function):
        raise Refused(f"--rival {target}: expected a function, got {type(function).__name__}")
    return function


class Worker:
    """What the rival's process does, a method for each question."""

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device = function, device
        self._sample = Sample("")
        self._turns: tuple[Workload, Timer] | None = None

    def fits(self, positional: int, named: list[str]) -> str | None:
        """Why the function's signature does not take a call, or None."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # compiled code may have none: the call itself will tell
            return None
        try:
            signature.bind(*[None] * positional, **dict.fromkeys(named))
        except TypeError as error:
            words = f"{positional} positional arguments" + (f" and {', '.join(named)} by name" if named else "")
            return f"its signature {signature} does not take the call, {words}: {error}"
        return None

    def run(self, inputs: str, outputs: str) -> dict[str, float]:
        """Seconds of the first calls on the inputs in a file; outputs and gradients go to another."""
        args, kwargs = torch.load(inputs, map_location=self.device, weights_only=True)
        self._sample = Sample("", args, kwargs)
        found = first_calls(self.function, self._sample, self.device)
        torch.save(results(self.function, self._sample), outputs)
        return found

    def prepare(self, direction: str, cold: bool) -> None:
        call = calls_of({"rival": self.function}, self._sample, direction)["rival"]
        timer = Timer(self.device, cold)
        timer.calibrate(call, self.device)
        self._turns = call, timer

    def _prepared(self) -> tuple[Workload, Timer]:
        assert self._turns is not None, "prepare comes first"
        return self._turns

    def seconds(self) -> float:
        call, timer = self._prepared()
        call.run(call.prepare())
        return timer(call, self.device)

    def outcome(self) -> tuple[int | None, bool]:
        _, timer = self._prepared()
        return timer.peaks.get("rival"), "rival" in timer.behind

    def host(self) -> list[float]:
        return host_seconds(self._prepared()[0], self.device)


def serve(connection, target: str, device: str, threads: int) -> None:
    """The rival's process: answers until the connection closes."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        worker = Worker(load(target), torch.device(device))
    except Refused as error:
        connection.send((False, str(error)))
        return
    connection.send((True, None))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            what, arguments = connection.recv()
            try:
                connection.send((True, getattr(worker, what)(*arguments)))
            except Exception as error:
                connection.send((False, first_line(error)))
