"""Proof without a GPU: every kernel and launch setting compiled ahead of time, and what ptxas made of it.

    python -m fastllm.bench.static [OP...] [--arch 80 90 100] [--dtype bfloat16] [--shape TEXT...] [--json FILE]

prints, per launch: registers and spills, shared memory, occupancy, widths of global loads and stores, tensor-core
and special-function instructions. The launches are those of the ops themselves on the shapes of bench/<op>.py.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from ..kernels.device import GPUS
from ..parser import first_paragraph
from ..registry import OPS, Op
from . import cases
from .budget import Budget
from .capture import CUDA, Launch, check_compiles, launches, short_name
from .interpreter import with_interpreter, without_interpreter
from .run import plan
from .sass import Resources, read_resources


@dataclass(frozen=True)
class Row:
    """One kernel of one call, and the grids that it was launched with."""

    op: str
    shape: str
    dtype: str
    arch: int
    direction: str
    kernel: str
    grids: list[tuple[int, ...]]
    resources: Resources


# Compiled kernel's hash -> what it takes; calls of several shapes often launch the same.
_known: dict[str, Resources] = {}


def rows_of(op: Op, shape: str, arches: Sequence[int], dtype: torch.dtype) -> list[Row]:
    """What one call launches, compiled for ``arches``."""
    found = []
    for arch in arches:
        same: dict[tuple[str, str], list[Launch]] = {}
        for launch in launches(op, partial(cases.shapes_of(op.name)[shape], CUDA, dtype), GPUS[arch]):
            same.setdefault((launch.direction, launch.compiled.hash), []).append(launch)
        for (direction, key), group in same.items():
            if key not in _known:
                _known[key] = read_resources(group[0].compiled)
            found.append(
                Row(
                    op=op.name,
                    shape=shape,
                    dtype=str(dtype).removeprefix("torch."),
                    arch=arch,
                    direction=direction,
                    kernel=group[0].kernel,
                    grids=[launch.grid for launch in group],
                    resources=_known[key],
                )
            )
    return found


def _compiled_elsewhere(op: str, shape: str, arches: Sequence[int], dtype: torch.dtype) -> list[Row]:
    return rows_of(OPS[op], shape, arches, dtype)


def rows(
    ops: Iterable[Op],
    arches: Iterable[int] = tuple(GPUS),
    dtype: torch.dtype = torch.bfloat16,
    shapes: Sequence[str] = ("",),
    *,
    budget: Budget | None = None,
    workers: int = 1,
) -> Iterator[Row]:
    """Compiles what the ops launch on those of their shapes whose name contains one of ``shapes``.

    Ops without Triton kernels have no rows. The first shape of every op comes first, as in ``fastllm bench``.

    Args:
        budget: no call begins after it; default: all do.
        workers: processes that compile.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    check_compiles()
    arches, budget = list(arches), budget or Budget()
    todo = [(case.op, case.name) for case in plan([op for op in ops if "triton" in op.backends], list(shapes))]

    if workers == 1:
        for op, shape in todo:
            if budget.allows(f"{op.name}, {shape}"):
                yield from rows_of(op, shape, arches, dtype)
        return
    # A process that has run PyTorch's threads must not be forked.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting, running = list(todo), []
        while waiting or running:
            while waiting and len(running) < workers:
                op, shape = waiting.pop(0)
                if budget.allows(f"{op.name}, {shape}"):
                    running.append(pool.submit(_compiled_elsewhere, op.name, shape, arches, dtype))
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.remove(future)
                yield from future.result()


def problems(row: Row) -> list[str]:
    """What no kernel of this library may have: spills, fp64 arithmetic, more shared memory than a block can have."""
    found = []
    if row.resources.spills:
        found.append(f"{row.resources.spills} loads and stores of thread-local memory")
    if row.resources.doubles:
        found.append(f"{row.resources.doubles} fp64 instructions")
    if not row.resources.occupancy(row.arch) or row.resources.shared > GPUS[row.arch].shared_per_block:
        found.append("does not fit on a multiprocessor")
    return found


def read_rows(file: Path) -> list[Row]:
    """What ``--json`` wrote."""
    found = json.loads(file.read_text())
    return [
        Row(**{**row, "grids": [tuple(grid) for grid in row["grids"]], "resources": Resources(**row["resources"])})
        for row in found
    ]


COLUMNS = (
    "op",
    "shape",
    "pass",
    "kernel",
    "sm",
    "grid",
    "warps",
    "regs",
    "spills",
    "shared",
    "occ.",
    "loads",
    "stores",
)
MIX = ("tensor core", "TMA", "MUFU", "fp64")


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in widths.items())


def cells(row: Row) -> list[str]:
    """The row under :data:`COLUMNS` and :data:`MIX`."""
    r = row.resources
    grids = [("x".join(map(str, grid)), n) for grid, n in Counter(row.grids).items()]
    return [
        row.op,
        row.shape,
        row.direction[:3],
        short_name(row.kernel),
        str(row.arch),
        ", ".join(grid if n == 1 else f"{grid} ({n} times)" for grid, n in grids),
        str(r.num_warps),
        str(r.registers),
        str(r.spills),
        str(r.shared),
        f"{r.occupancy(row.arch):.0%}",
        _widths(r.load_widths),
        _widths(r.store_widths),
        str(r.tensor_core),
        str(r.tma),
        str(r.count("MUFU")),
        str(r.doubles),
    ]


def both(arguments: Sequence[str], **options) -> dict[str, subprocess.Popen]:
    """Starts this module and model.py, the one without, the other in Triton's interpreter, side by side.

    ``{module}`` in an argument is the one's name or the other's.
    """
    return {
        module: subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *(a.format(module=module) for a in arguments)],
            env=environment,
            **options,
        )
        for module, environment in (("static", without_interpreter()), ("model", with_interpreter()))
    }


def both_tables(ops: Sequence[str], shapes: Sequence[str] = ("",), budget: float = math.inf) -> int:
    """Prints this module's table and model.py's. Returns the larger of their exit codes."""
    # The last call begun may take a while; what is printed must still come in time.
    arguments = [*ops, "--shape", *shapes, *([] if budget == math.inf else ["--budget", str(0.8 * budget)])]
    with tempfile.TemporaryFile("w+") as later:
        running = both(arguments, stdout=later)
        codes = [process.wait() for process in running.values()]
        later.seek(0)
        print(later.read())
    return max(codes)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. 1 where a kernel has one of :func:`problems`."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.static", description=first_paragraph(__doc__))
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to compile (all that have shapes)")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS), help="sm versions")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--json", metavar="FILE", help="write every row with its opcodes there")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no call after it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    options = parser.parse_args(argv)
    try:
        ops = cases.selected(options.ops)
    except ValueError as error:
        parser.error(str(error))
    budget = Budget(options.budget)
    dtype = getattr(torch, options.dtype)
    workers = max(1, options.workers)
    found = list(rows(ops, options.arch, dtype, options.shape, budget=budget, workers=workers))
    order = {op.name: i for i, op in enumerate(ops)}
    found.sort(key=lambda row: (order[row.op], row.shape, row.direction, row.kernel, row.arch))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in found]))
    from rich.table import Table

    from .report import console

    table = Table(*COLUMNS, *MIX, title=f"Triton {triton.__version__}, {options.dtype}")
    for row in found:
        table.add_row(*cells(row))
    console(200).print(table)
    for line in budget.left_out:
        print(f"left out: {line}")
    bad = [(row, problem) for row in found for problem in problems(row)]
    for row, problem in bad:
        print(f"{row.op}, {row.shape}, sm_{row.arch}: {row.kernel}: {problem}")
    print(f"{len(found)} kernels, {len(bad)} problems")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
