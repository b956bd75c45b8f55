"""How long each call should take: bytes, floating-point operations and launches against what a GPU can do.

    python -m fastllm.bench.model [OP...] [--arch 90] [--dtype bfloat16] [--shape TEXT...] [--json FILE]

Bytes are counted in Triton's interpreter on the real shape, with the grid of the real GPU, over a few programs of each
launch (traffic.py). What follows the device is the GPU's: its number of processors, and the workspace of the linear
losses, which a CPU has less of. The time is a roofline: the larger of bytes over the copy bandwidth and operations over
the matrix rate, plus LAUNCH for each launch. The floor is the same of the least bytes in one launch. It says what a
perfect schedule of these accesses would take; what the kernels lose beyond it shows on a GPU only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..backends import interpreting
from ..kernels import device
from ..ops.cross_entropy.chunks import default_workspace_mb
from ..parser import first_paragraph
from ..registry import Op, Sample
from . import cases, interpreter
from .budget import Budget
from .run import plan
from .traffic import measure

# Programs of a launch that are run: enough to see uneven shares, few enough for the interpreter.
PROGRAMS = 8
# Bytes of a call's tensors above which a shape is left out: the interpreter runs in this machine's memory.
LARGEST = 1 << 29
# Seconds from one kernel's end to the next one's start in a stream: assumed, not measured.
LAUNCH = 2e-6


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOPs a second."""

    copy: float
    matrix: float


# Measured on an H200 (copy of a large tensor; 8192^3 bf16 product).
RATES = {90: Rates(4.3e12, 790e12)}


@dataclass(frozen=True)
class Row:
    """One direction of one call. Seconds and bytes."""

    op: str
    shape: str
    dtype: str
    arch: int
    direction: str
    least_bytes: int
    counted_bytes: int
    flops: int
    launches: int

    @property
    def seconds(self) -> float:
        rates = RATES[self.arch]
        return max(self.counted_bytes / rates.copy, self.flops / rates.matrix) + self.launches * LAUNCH

    @property
    def floor(self) -> float:
        rates = RATES[self.arch]
        return max(self.least_bytes / rates.copy, self.flops / rates.matrix) + LAUNCH


def _with_workspace(op: Op, call: Sample) -> Sample:
    """``call`` with the workspace that it has on a GPU, where the op has one. The call's own tensors are a CPU's."""
    if "max_workspace_mb" not in inspect.signature(op.function).parameters:
        return call
    workspace = default_workspace_mb("cuda", call.args[0].shape[:-1].numel())
    return replace(call, kwargs={"max_workspace_mb": workspace, **call.kwargs})


def rows(
    ops: Iterable[Op], arch: int = 90, dtype: torch.dtype = torch.bfloat16, shapes: Iterable[str] = ("",),
    budget: Budget | None = None,
) -> Iterator[Row]:  # fmt: skip
    """The rows of those of the ops' shapes whose name contains one of ``shapes`` and that fit in LARGEST bytes.

    Ops without Triton kernels have no rows. No call begins after ``budget``.

    Raises:
        RuntimeError: Triton's interpreter is off.
    """
    budget = budget or Budget()
    for case in plan([op for op in ops if "triton" in op.backends], list(shapes)):
        op, name = case.op, case.name
        if cases.held_bytes(case.make(torch.device("meta"), dtype)) > LARGEST:
            continue
        if not budget.allows(f"{op.name}, {name}"):
            continue
        call = _with_workspace(op, case.make(torch.device("cpu"), dtype))
        # The launchers see the GPU's number of processors in place of the interpreter's.
        seen = device.INTERPRETER._replace(processors=device.GPUS[arch].processors)
        with mock.patch.object(device, "INTERPRETER", seen):
            measured = measure(op, call, programs=PROGRAMS)
        common: dict[str, Any] = dict(op=op.name, shape=name, dtype=str(dtype).removeprefix("torch."), arch=arch)
        for direction, traffic in (("forward", measured.forward), ("backward", measured.backward)):
            yield Row(
                **common,
                direction=direction,
                least_bytes=getattr(measured.cost, f"{direction}_bytes"),
                counted_bytes=traffic.total,
                flops=getattr(measured.cost, f"{direction}_flops"),
                launches=traffic.launches,
            )


COLUMNS = ("op", "shape", "pass", "least MB", "counted MB", "ratio", "GFLOP", "launches", "floor us", "modelled us")


def cells(row: Row) -> list[str]:
    """The row under :data:`COLUMNS`."""
    return [
        row.op,
        row.shape,
        row.direction,
        f"{row.least_bytes / 1e6:,.1f}",
        f"{row.counted_bytes / 1e6:,.1f}",
        f"{row.counted_bytes / row.least_bytes:.3f}",
        f"{row.flops / 1e9:,.0f}",
        str(row.launches),
        f"{row.floor * 1e6:,.1f}",
        f"{row.seconds * 1e6:,.1f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. Where the interpreter is off, it runs in a process that has it."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.model", description=first_paragraph(__doc__))
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to model (all that have shapes)")
    parser.add_argument("--arch", type=int, choices=list(RATES), default=90, help="sm version")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no call after it")
    options = parser.parse_args(argv)
    try:
        ops = cases.selected(options.ops)
    except ValueError as error:
        parser.error(str(error))
    if not interpreting():
        command = [sys.executable, "-m", "fastllm.bench.model", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=interpreter.with_interpreter()).returncode
    budget = Budget(options.budget)
    found = list(rows(ops, options.arch, getattr(torch, options.dtype), options.shape, budget))
    order = {op.name: i for i, op in enumerate(ops)}
    found.sort(key=lambda row: order[row.op])
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in found]))
    from rich.table import Table

    from .report import console

    table = Table(*COLUMNS, title=f"{device.GPUS[options.arch].name}, {options.dtype}")
    for row in found:
        table.add_row(*cells(row))
    console(200).print(table)
    for line in budget.left_out:
        print(f"left out: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
