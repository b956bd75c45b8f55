"""What the kernels become on the GPUs that no launch table is chosen for, and whether a launch there is a legal one.

    python -m fastllm.bench.other_gpus [OP...] [--gpu sm_75 sm_86 sm_89 sm_120 gfx942 gfx950 gfx1100 gfx1201]
                                       [--json FILE]

compiles each kernel on a few shapes, as bench/static.py does all of them for sm_80, sm_90 and sm_100, and prints
registers, spills, shared memory and matrix instructions. It exits with 1 where a launch breaks a limit of its GPU or a
kernel spills. Nothing here has run on any of these GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from ..kernels.device import OTHER_GPUS, DeviceInfo
from ..parser import first_paragraph
from ..registry import OPS
from . import cases
from .capture import CUDA, Launch, launches, short_name
from .limits import Footprint, over_limits
from .static import read_resources

# The shapes, by parts of their names.
SHAPES = {
    "layer_norm": ("8192x4096", "head norm", "wide 4096x16384", "32768x65536"),
    "add_layer_norm": ("GPT-2 8192x768",),
    "cross_entropy": ("bytes", "8192x32000", "8192x128256"),
    "swiglu": ("Llama-3 8B 8192x14336",),
    "geglu": ("Llama-3 8B 8192x14336",),
    "rotary_embedding": ("Llama-3 8B 8192x(32+8)x128",),
    "attention": (
        "d64 causal", "d128 causal", "d256 causal", "d128 window", "d64 bias", "d64 dropout", "d128 decode",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class OtherRow:
    """A kernel of one call on one GPU. ``spills``: instructions on NVIDIA's, registers on AMD's."""

    gpu: str
    op: str
    shape: str
    dtype: str
    direction: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spills: int
    shared: int
    matrix: int


def _amd_metadata(assembly: str, name: str) -> int:
    return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)


def row_of(gpu: DeviceInfo, op: str, shape: str, dtype: torch.dtype, launch: Launch) -> OtherRow:
    """What a compiled launch takes on ``gpu``, read from its assembly."""
    compiled = launch.compiled
    if gpu.vendor == "amd":
        assembly = compiled.asm["amdgcn"]
        registers, spills = (_amd_metadata(assembly, name) for name in ("vgpr_count", "vgpr_spill_count"))
        matrix = len(re.findall(r"^\s*v_(?:s?mfmac?|s?wmmac?)_", assembly, re.MULTILINE))
    else:
        resources = read_resources(compiled)
        registers, spills, matrix = resources.registers, resources.spills, resources.tensor_core
    kernel = short_name(launch.kernel)
    metadata = compiled.metadata
    return OtherRow(
        gpu.architecture, op, shape, str(dtype).removeprefix("torch."), launch.direction, kernel, launch.grid,
        metadata.num_warps, registers, spills, metadata.shared, matrix,
    )  # fmt: skip


def breaches(gpu: DeviceInfo, row: OtherRow) -> list[str]:
    """The limits of ``gpu`` that a launch breaks; a spill is one."""
    # AMD's registers bound how many blocks share a multiprocessor, never whether one launches.
    registers = row.registers if gpu.vendor == "nvidia" else 0
    found = over_limits(Footprint(row.grid, row.warps * gpu.lanes, registers, row.shared), gpu)
    if 0 in row.grid:
        found.append(f"an empty grid of {row.grid}")
    if row.spills:
        found.append(f"{row.spills} spills")
    return found


def rows(ops: Iterable[str], gpus: Iterable[str]) -> Iterator[OtherRow]:
    """Each kernel of each call once. Attention is left out where PyTorch's own serves; sm_75 computes in float16.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    for name in gpus:
        gpu = OTHER_GPUS[name]
        dtype = torch.bfloat16 if gpu.has_bfloat16 else torch.float16
        for op in ops:
            if op == "attention" and gpu.product_obstacle is not None:
                continue
            for shape, make in cases.shapes_of(op).items():
                if any(part in shape for part in SHAPES[op]):
                    found = launches(OPS[op], partial(make, CUDA, dtype), gpu)
                    for launch in {one.compiled.hash: one for one in found}.values():
                        yield row_of(gpu, op, shape, dtype, launch)


COLUMNS = ("op", "shape", "pass", "kernel", "GPU", "warps", "registers", "spills", "shared KB", "matrix instructions")


def cells(row: OtherRow) -> list[str]:
    """The row of a table under COLUMNS."""
    return [
        row.op, row.shape, row.direction, row.kernel, row.gpu, str(row.warps), str(row.registers), str(row.spills),
        f"{row.shared / 1024:.1f}", str(row.matrix),
    ]  # fmt: skip


def read_rows(file: Path) -> list[OtherRow]:
    """What ``--json`` wrote."""
    return [OtherRow(**{**row, "grid": tuple(row["grid"])}) for row in json.loads(file.read_text())]


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.other_gpus", description=first_paragraph(__doc__))
    parser.add_argument("ops", nargs="*", metavar="OP", choices=(*SHAPES, []), help="of these (all)")
    parser.add_argument("--gpu", nargs="+", choices=list(OTHER_GPUS), default=list(OTHER_GPUS))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every row there")
    options = parser.parse_args(argv)
    found, bad = [], 0
    print(f"Triton {triton.__version__}")
    for row in rows(options.ops or SHAPES, options.gpu):
        found.append(row)
        wrong = breaches(OTHER_GPUS[row.gpu], row)
        bad += bool(wrong)
        print(" | ".join(cells(row)), *wrong, sep=" ! ", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found]))
    print(f"{len(found)} kernels, {bad} break a limit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
