"""Proof without a GPU: every kernel and launch setting compiled ahead of time, and what ptxas made of it.

    python -m fastllm.bench.static [OP...] [--arch 80 90 100] [--dtype bfloat16] [--shape TEXT...] [--json FILE]

prints, per launch: registers and spills, shared memory, occupancy, widths of global loads and stores, tensor-core
and special-function instructions. The launches are those of the ops themselves on the shapes of bench/<op>.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from ..registry import Op
from . import cases
from .capture import CUDA, GPUS, Launch, launches

_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_TENSOR_CORE = ("HGMMA", "HMMA", "QGMMA", "IMMA", "IGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
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

    def count(self, *families: str) -> int:
        """Instructions whose opcode, up to its first dot, is one of ``families``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.partition(".")[0] in families)

    @property
    def spills(self) -> int:
        """Loads and stores of thread-local memory; at least 1 where there is a stack."""
        return max(self.count("LDL", "STL"), int(self.stack > 0))

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
        gpu = GPUS[arch]
        # Registers are given to a warp in units of 256, 1 KB of shared memory a block is the system's.
        by_registers = gpu.registers // (-(-self.registers * 32 // 256) * 256) // self.num_warps
        by_shared = gpu.shared_per_processor // (self.shared + 1024)
        by_warps = gpu.warps // self.num_warps
        return min(by_registers, by_shared, by_warps, gpu.blocks) * self.num_warps / gpu.warps


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
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout


def read_resources(compiled) -> Resources:
    """Registers, stack, shared memory and opcodes of a kernel that Triton compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = [tuple(map(int, m)) for m in _RESOURCES.findall(_cuobjdump("--dump-resource-usage", cubin))]
        opcodes = Counter(_OPCODE.findall(_cuobjdump("-sass", cubin)))
    if not used or not opcodes:
        raise RuntimeError(f"cuobjdump found no code in the cubin of {compiled.name}")
    return Resources(
        registers=max(registers for registers, _ in used),
        stack=max(stack for _, stack in used),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        opcodes=dict(sorted(opcodes.items())),
    )


def rows(
    ops: Iterable[Op],
    arches: Iterable[int] = tuple(GPUS),
    dtype: torch.dtype = torch.bfloat16,
    shapes: Sequence[str] = ("",),
) -> Iterator[Row]:
    """Compiles what the ops launch on those of their shapes whose name contains one of ``shapes``.

    Ops without Triton kernels have no rows.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    arches = list(arches)
    known: dict[str, Resources] = {}
    for op in ops:
        if "triton" not in op.backends:
            continue
        for name, make in cases.shapes_of(op.name).items():
            if not any(shape in name for shape in shapes):
                continue
            for arch in arches:
                same: dict[tuple[str, str], list[Launch]] = {}
                for launch in launches(op, partial(make, CUDA, dtype), GPUS[arch]):
                    same.setdefault((launch.direction, launch.compiled.hash), []).append(launch)
                for (direction, key), group in same.items():
                    if key not in known:
                        known[key] = read_resources(group[0].compiled)
                    yield Row(
                        op=op.name,
                        shape=name,
                        dtype=str(dtype).removeprefix("torch."),
                        arch=arch,
                        direction=direction,
                        kernel=group[0].kernel,
                        grids=[launch.grid for launch in group],
                        resources=known[key],
                    )


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
        row.kernel.strip("_").removesuffix("_kernel"),
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


def both_tables(ops: Sequence[str], shapes: Sequence[str] = ("",)) -> None:
    """Prints this module's table and model.py's: the one without, the other in Triton's interpreter, a process each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # 3.9 warns while it is unset; 1 is what it and older versions do by default.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for module, more in (("static", {}), ("model", {"TRITON_INTERPRET": "1"})):
        command = [sys.executable, "-m", f"{__package__}.{module}", *ops, "--shape", *shapes]
        subprocess.run(command, env=environment | more, check=True)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to compile (all that have shapes)")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS), help="sm versions")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--json", metavar="FILE", help="write every row with its opcodes there")
    options = parser.parse_args(argv)
    try:
        ops = cases.selected(options.ops)
    except ValueError as error:
        parser.error(str(error))
    found = list(rows(ops, options.arch, getattr(torch, options.dtype), options.shape))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in found]))
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, *MIX, title=f"Triton {triton.__version__}, {options.dtype}")
    for row in found:
        table.add_row(*cells(row))
    Console(width=None if Console().is_terminal else 200).print(table)


if __name__ == "__main__":
    main()
