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
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.cache import get_cache_manager

from ..kernels.device import GPUS
from ..parser import first_paragraph
from ..registry import OPS, Op
from . import cases
from .budget import Budget
from .capture import CUDA, Launch, check_compiles, launches, short_name
from .interpreter import compiling, interpreting
from .limits import REGISTERS, warp_registers
from .run import plan

# An instruction's address, its condition, its opcode and its operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_LOCAL = ("LDL", "STL")
# The number changes with the fields of Resources.
_RESOURCES_FILE = "fastllm_resources_2.json"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_TENSOR_CORE = ("HGMMA", "HMMA", "QGMMA", "IMMA", "IGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
# What bounds occupancy on sm_80, sm_90 and sm_100 alike: warps and blocks of a processor, beside a block's registers.
WARPS, BLOCKS = 64, 32
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, stack and shared memory in bytes, SASS opcode counts."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    num_stages: int
    opcodes: dict[str, int]
    narrow_products: int = 0
    """32-bit products of two numbers that are known at the launch only: as offsets they may overflow."""
    looped_spills: int = 0
    """Of :attr:`local_accesses`, those inside a loop."""
    loop_length: int = 0
    """Instructions of the loops that have :attr:`looped_spills`, with the loops around them."""

    def count(self, *families: str) -> int:
        """Instructions whose opcode, up to its first dot, is one of ``families``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.partition(".")[0] in families)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of thread-local memory."""
        return self.count(*_LOCAL)

    @property
    def untouched_stack(self) -> bool:
        """Whether there is a stack that no instruction loads from or stores to."""
        return self.stack > 0 and not self.local_accesses

    @property
    def spills(self) -> int:
        """:attr:`local_accesses`; at least 1 where there is a stack."""
        return max(self.local_accesses, int(self.stack > 0))

    @property
    def doubles(self) -> int:
        """fp64 arithmetic and conversions."""
        return self.count(*_DOUBLE) + sum(n for opcode, n in self.opcodes.items() if ".F64" in opcode)

    @property
    def tensor_core(self) -> int:
        return self.count(*_TENSOR_CORE)

    @property
    def tma(self) -> int:
        """Bulk tensor copies (UTMALDG, UTMASTG, UTMAREDG)."""
        return self.count("UTMALDG", "UTMASTG", "UTMAREDG")

    def widths(self, *families: str) -> dict[int, int]:
        """Bits per thread -> instructions, of the memory operations ``families``."""
        found: Counter[int] = Counter()
        for opcode, n in self.opcodes.items():
            family, *modifiers = opcode.split(".")
            if family in families:
                found[next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 32)] += n
        return dict(sorted(found.items(), reverse=True))

    @property
    def load_widths(self) -> dict[int, int]:
        return self.widths(*_LOADS)

    @property
    def store_widths(self) -> dict[int, int]:
        return self.widths(*_STORES)

    def occupancy(self, arch: int) -> float:
        """Share of a processor's warps that can be resident, bounded by registers, shared memory and blocks."""
        # 1 KB of shared memory a block is the system's, and a processor has 1 KB more than a block can have.
        by_registers = REGISTERS // warp_registers(self.registers) // self.num_warps
        by_shared = (GPUS[arch].shared_per_block + 1024) // (self.shared + 1024)
        by_warps = WARPS // self.num_warps
        return min(by_registers, by_shared, by_warps, BLOCKS) * self.num_warps / WARPS


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


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


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    """One instruction of a kernel: its address, its opcode, and the addresses of those that may follow it."""

    address: int
    opcode: str
    then: tuple[int, ...]


def instructions(sass: str) -> list[Instruction]:
    """What ``cuobjdump -sass`` prints of one kernel."""
    lines = _INSTRUCTION.findall(sass)
    found = []
    for (address, condition, opcode, operands), following in zip(lines, [*lines[1:], None], strict=True):
        family = opcode.partition(".")[0]
        target = _TARGET.search(operands) if family == "BRA" else None
        then = [] if target is None else [int(target[1], 16)]
        # A branch may have its condition among its operands.
        always = not condition and (family in ("EXIT", "RET") or (family == "BRA" and "," not in operands))
        if following is not None and not always:
            then.append(int(following[0], 16))
        found.append(Instruction(int(address, 16), opcode, tuple(then)))
    return found


def _reached(start: int, edges: Mapping[int, Iterable[int]]) -> set[int]:
    """The addresses that a path of at least one edge leads to."""
    found, waiting = set(), [start]
    while waiting:
        new = set(edges.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def spills_in_loops(code: list[Instruction]) -> dict[str, int]:
    """The fields ``looped_spills`` and ``loop_length`` of :class:`Resources`.

    An instruction is in a loop that leads back to itself: code that lies behind the kernel's end, where it waits for a
    copy, is part of one or of none by what follows it, not by where it lies.
    """
    after = {one.address: one.then for one in code}
    before: dict[int, list[int]] = {}
    for one in code:
        for address in one.then:
            before.setdefault(address, []).append(one.address)
    looped, loops = 0, set()
    for one in code:
        if one.opcode.partition(".")[0] in _LOCAL and one.address in (ahead := _reached(one.address, after)):
            looped += 1
            loops |= ahead & _reached(one.address, before)
    return {"looped_spills": looped, "loop_length": len(loops)}


def read_resources(compiled) -> Resources:
    """Registers, stack, shared memory and opcodes of a kernel that Triton compiled; Triton's cache keeps them too."""
    cache = get_cache_manager(compiled.hash)
    known = cache.get_file(_RESOURCES_FILE)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text()))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = [tuple(map(int, m)) for m in _RESOURCES.findall(_cuobjdump("--dump-resource-usage", cubin))]
        code = instructions(_cuobjdump("-sass", cubin))
        opcodes = Counter(one.opcode for one in code)
    if not used or not opcodes:
        raise RuntimeError(f"cuobjdump found no code in the cubin of {compiled.name}")
    found = Resources(
        registers=max(registers for registers, _ in used),
        stack=max(stack for _, stack in used),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        opcodes=dict(sorted(opcodes.items())),
        narrow_products=narrow_products(compiled.asm.get("ttir", "")),
        **spills_in_loops(code),
    )
    cache.put(json.dumps(asdict(found)), _RESOURCES_FILE, binary=False)
    return found


_ASSIGNED = re.compile(
    r"^\s*(%[\w#.]+) = (arith\.constant|tt\.splat|arith\.muli)\b *(%[\w#.]+)?,? *(%[\w#.]+)?(.*)", re.MULTILINE
)


def narrow_products(ttir: str) -> int:
    """See :class:`Resources`. A product with a constant of the kernel, such as its tile's size, is none."""
    constants, found = set(), 0
    for name, operator, a, b, rest in _ASSIGNED.findall(ttir):
        if operator == "arith.constant" or (operator == "tt.splat" and a in constants):
            constants.add(name)
        elif operator == "arith.muli" and not {a, b} & constants:
            found += bool(re.search(r": (?:tensor<[\dx]*x)?i32", rest))
    return found


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
        for module, environment in (("static", compiling()), ("model", interpreting()))
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
