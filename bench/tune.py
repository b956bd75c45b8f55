"""``fastllm bench --tune OP``: searches launch settings on a GPU and rewrites kernels/tuned.py.

Settings are those that a launcher passes through :func:`fastllm.kernels.launch.tuned`. From the launcher's own, each
is halved and doubled in turn, stages are one more or less, and registers are bound so that a multiprocessor holds two
blocks, for as long as the call gets faster outside the noise. What fails, or is not as close to the truth as the op has
to be, is passed over.

The Gluon kernels of attention are left out. Half and twice their settings are no candidates: twice the keys of a step
spills at head dim 128, twice the buffers does not fit in a block's shared memory there, and a setting that has not run
in the emulator of tests/gluon_machine.py could wait for ever. kernels/attention/hopper.py and hopper_backward.py have
them, by the head dim.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from ..backends import backend
from ..kernels import launch as _launch
from ..kernels import tuned as _tuned
from ..registry import Op
from . import cases
from .cases import calls_of
from .parity import Judge
from .report import verdict
from .run import LARGEST, Planned, plan
from .timing import Quartiles, Timer, interleaved

Settings = dict[str, int]
TABLE = Path(_tuned.__file__)
# Rounds in which two settings are timed. A guess.
ROUNDS = 60
ASSIGNMENT = "TUNED: dict[tuple, dict[str, int]] = "


class Table(dict):
    """In the place of TUNED: notes what launchers ask for, and answers with ``trial`` where that has the key."""

    def __init__(self, entries=()):
        super().__init__(entries)
        self.asked: dict[tuple, Settings] = {}
        self.trial: dict[tuple, Settings] = {}

    def get(self, key, default=None):
        found = self.trial.get(key) or super().get(key, default)
        self.asked.setdefault(key, dict(found or {}))
        return found


# Next to 3 of these are 2 and 4.
COUNTED = ("num_stages", "STAGES")
# A multiprocessor's, of every GPU of NVIDIA that is served.
REGISTERS = 65536


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Each setting halved and doubled, stages one more and one less, the others as they are.

    And attention's, which take a bound on registers, with one that lets a multiprocessor hold two blocks: at as many
    stages, and at one less, for which shared memory may have room twice.
    """
    for name, value in settings.items():
        for changed in (value - 1, value + 1) if name in COUNTED else (value // 2, value * 2):
            if changed >= 1:
                yield settings | {name: changed}
    stages, bound = settings.get("num_stages", 0), REGISTERS // (2 * 32 * settings.get("num_warps", 1))
    if stages and "maxnreg" not in settings and bound < 256:
        for fewer in (stages, stages - 1):
            if fewer >= 1:
                yield settings | {"num_stages": fewer, "maxnreg": bound}


def search(start: Settings, faster: Callable[[Settings, Settings], bool]) -> Settings:
    """The end of a walk from ``start``, each step to a neighbour that is ``faster(neighbour, current)``."""
    current, seen = start, [start]
    moved = True
    while moved:
        moved = False
        for settings in neighbours(current):
            if settings not in seen:
                seen.append(settings)
                if faster(settings, current):
                    current, moved = settings, True
                    break
    return current


def rewrite(text: str, found: dict[tuple, Settings], where: str, on: date) -> str:
    """The source of kernels/tuned.py with ``found`` in its table, and a line that says where and when it was measured.

    Raises:
        ValueError: ``text`` has no literal table.
    """
    head, assignment, literal = text.partition(ASSIGNMENT)
    if not assignment:
        raise ValueError("kernels/tuned.py has no table TUNED to rewrite")
    end = ast.parse(assignment + literal).body[0].end_lineno
    rest = literal.splitlines(keepends=True)[end:]
    entries = ast.literal_eval("".join(literal.splitlines(keepends=True)[:end]).strip()) | found
    head = head.rstrip() + "\n" if f"# {where}, {on}" in head else f"{head.rstrip()}\n\n# {where}, {on}.\n"
    lines = "".join(f"    {key!r}: {entries[key]!r},\n" for key in sorted(entries)).replace("'", '"')
    return f"{head}{ASSIGNMENT}{{\n{lines}}}\n{''.join(rest)}"


def tune(ops: list[Op], dtypes: list[str], shape: list[str], tell: Callable[[str], None] = print) -> dict:
    """Key -> settings that beat the launcher's own on this GPU, over the shapes of ``ops``.

    Raises:
        ValueError: there is no GPU, or no launcher of these ops asks for settings.
    """
    if not torch.cuda.is_available():
        raise ValueError("--tune: there is no GPU here, and settings are only worth what was measured")
    device = torch.device("cuda")
    found: dict[tuple, Settings] = {}
    asked: set[tuple] = set()
    table = Table(_tuned.TUNED)
    with mock.patch.object(_launch, "TUNED", table), backend("triton"):
        for planned, dtype in product(plan(ops, shape), dtypes):
            kind = getattr(torch, dtype)
            if cases.held_bytes(planned.make(torch.device("meta"), kind)) > LARGEST["cuda"] // 4:
                continue
            table.asked.clear()
            trials = _Trials(planned, kind, device, table)
            for key, start in list(table.asked.items()):
                if key in asked:
                    continue
                asked.add(key)
                best = search(start, partial(trials.is_faster, key))
                table.trial = {}
                if best != start:
                    found[key] = best
                    tell(f"{planned.op.name}, {planned.name}, {dtype}: {key}: {start} -> {best}")
    if not asked:
        raise ValueError(f"--tune: no launcher of {', '.join(op.name for op in ops)} asks for settings")
    return found


class _Trials:
    """One call under settings that ``table`` is told to answer with. Making it runs the call once."""

    def __init__(self, planned: Planned, dtype: torch.dtype, device: torch.device, table: Table):
        self.op, self.device, self.table = planned.op, device, table
        sample = replace(planned.make(device, dtype), name=planned.name)
        self.judge = Judge(self.op, self.op.reference, sample, dtype)
        self.call = calls_of({"one": self.op.function}, sample, "both")["one"]
        self.call.run(self.call.prepare())

    def is_faster(self, key: tuple, new: Settings, old: Settings) -> bool:
        """Whether the call is right under ``new`` for ``key``, and outside the noise faster than under ``old``."""
        self.table.trial = {key: new}
        try:
            if self.judge.problem(self.op.function) is not None:
                return False
        except Exception:  # does not compile, or does not fit
            return False
        timer = _Switching(self.device, self.table, key)
        samples = interleaved({"new": (new, self.call), "old": (old, self.call)}, ROUNDS, self.device, timer=timer)
        return verdict(Quartiles.of(samples["old"]), Quartiles.of(samples["new"])) == "faster"


class _Switching:
    """Times a call under the settings that come with it."""

    def __init__(self, device: torch.device, table: Table, key: tuple):
        self.timer, self.table, self.key = Timer(device, cold=True), table, key

    def __call__(self, run, device: torch.device) -> float:
        settings, call = run
        self.table.trial = {self.key: settings}
        return self.timer(call, device)


def main(ops: list[Op], dtypes: list[str], shape: list[str]) -> int:
    """Tunes, and rewrites the table where something was found."""
    found = tune(ops, dtypes, shape)
    if not found:
        print("nothing is faster than what is there")
        return 0
    text = rewrite(TABLE.read_text(encoding="utf-8"), found, torch.cuda.get_device_name(), date.today())
    TABLE.write_text(text, encoding="utf-8")
    print(f"written: {TABLE}, {len(found)} entries")
    return 0
