"""What the kernels become on the GPUs that no launch table is chosen for, and whether a launch there is a legal one.

    python -m fastllm.bench.other_gpus [OP...] [--gpu sm_75 sm_86 sm_89 sm_120 gfx942 gfx950 gfx1100 gfx1201]
                                       [--samples] [--json FILE]

compiles each kernel on a few shapes, as bench/static.py does all of them for sm_80, sm_90 and sm_100, and prints
registers, spills, shared memory and matrix instructions. With --samples it compiles what the tests' samples and the
bench's calls launch, in every dtype. It exits with 1 where a launch breaks a limit of its GPU or a kernel spills.
Nothing here has run on any of these GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from ..kernels.device import OTHER_GPUS, DeviceInfo
from ..parser import first_paragraph
from ..registry import OPS, Op, Sample
from . import cases
from .capture import CUDA, Launch, launches, short_name
from .limits import EVERY_GPU, Footprint, over_limits
from .prepare import every_call
from .sass import read_resources

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
    """A kernel of one call on one GPU. ``spills``: instructions on NVIDIA's, registers on AMD's.

    ``stack`` is in bytes; of the spills, ``looped`` are in loops of ``loop_length`` instructions, and the kernel has
    ``length``. AMD's have 0 there.
    """

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
    stack: int = 0
    looped: int = 0
    loop_length: int = 0
    length: int = 0
    untouched_stack: bool = False
    """Nothing loads from the stack or stores to it: ``spills`` is then 1."""


def _amd_metadata(assembly: str, name: str) -> int:
    return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)


def row_of(gpu: DeviceInfo, op: str, shape: str, dtype: torch.dtype, launch: Launch) -> OtherRow:
    """What a compiled launch takes on ``gpu``, read from its assembly."""
    compiled = launch.compiled
    stack: dict[str, Any] = {}
    if gpu.vendor == "amd":
        assembly = compiled.asm["amdgcn"]
        registers, spills = (_amd_metadata(assembly, name) for name in ("vgpr_count", "vgpr_spill_count"))
        matrix = len(re.findall(r"^\s*v_(?:s?mfmac?|s?wmmac?)_", assembly, re.MULTILINE))
    else:
        resources = read_resources(compiled)
        registers, spills, matrix = resources.registers, resources.spills, resources.tensor_core
        stack = dict(
            stack=resources.stack, looped=resources.looped_spills, loop_length=resources.loop_length,
            length=sum(resources.opcodes.values()), untouched_stack=resources.untouched_stack,
        )  # fmt: skip
    kernel = short_name(launch.kernel)
    metadata = compiled.metadata
    return OtherRow(
        gpu.architecture, op, shape, str(dtype).removeprefix("torch."), launch.direction, kernel, grid=launch.grid,
        warps=metadata.num_warps, registers=registers, spills=spills, shared=metadata.shared, matrix=matrix, **stack,
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


def _few_calls(op: Op, gpu: DeviceInfo) -> Iterator[tuple[str, Callable[[], Sample], str, torch.dtype]]:
    dtype = torch.bfloat16 if gpu.has_bfloat16 else torch.float16
    for shape, make in cases.shapes_of(op.name).items():
        if any(part in shape for part in SHAPES[op.name]):
            yield shape, partial(make, CUDA, dtype), "triton", dtype


def rows(ops: Iterable[str], gpus: Iterable[str], samples: bool = False) -> Iterator[OtherRow]:
    """Each kernel of each call once. Attention is left out where PyTorch's own serves; sm_75 computes in float16.

    Args:
        samples: all of :func:`.prepare.every_call`, each kernel of a GPU once, not the calls of :data:`SHAPES`.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    for name in gpus:
        gpu, known = EVERY_GPU[name], set()
        for op in map(OPS.__getitem__, ops):
            if "attention" in op.name and gpu.product_obstacle is not None:
                continue
            for shape, make, backend, dtype in (every_call if samples else _few_calls)(op, gpu):
                for launch in {one.compiled.hash: one for one in launches(op, make, gpu, backend)}.values():
                    if not (samples and launch.compiled.hash in known):
                        known.add(launch.compiled.hash)
                        yield row_of(gpu, op.name, shape, dtype, launch)


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
    """The command line; see the module's docstring. 1 where a kernel breaks a limit, or spills inside a loop."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.other_gpus", description=first_paragraph(__doc__))
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops with kernels (those that have a few shapes here)")
    parser.add_argument("--gpu", nargs="+", choices=list(EVERY_GPU), default=list(OTHER_GPUS))
    parser.add_argument("--samples", action="store_true", help="every op's samples and all of the bench's calls")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every row there")
    options = parser.parse_args(argv)
    known = [op.name for op in OPS.values() if "triton" in op.backends] if options.samples else list(SHAPES)
    for name in options.ops:
        if name not in known:
            parser.error(f"no op {name!r} here; the ops are {', '.join(known)}")
    found, bad, outside = [], 0, 0
    print(f"Triton {triton.__version__}")
    for row in rows(options.ops or known, options.gpu, options.samples):
        found.append(row)
        wrong = breaches(EVERY_GPU[row.gpu], row)
        if row.stack and row.looped == 0 and len(wrong) == 1:
            outside += 1
        else:
            bad += bool(wrong)
        print(" | ".join(cells(row)), *wrong, sep=" ! ", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found]))
    print(f"{len(found)} kernels, {bad} break a limit, {outside} have a stack that no loop uses")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
