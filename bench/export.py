"""``fastllm bench export``: the ops' calls as other benchmarks read them.

``kernels`` is a folder for ``kernels benchmark`` of Hugging Face's package kernels, ``flashinfer`` a data set of
FlashInfer-Bench. Both call the ops of this package, so it has to be installed where they run. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..commands.parser import Parser
from ..config import path
from ..registry import Op, Sample
from . import cases
from .results import read_run

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Exported:
    """One call of an op: its shape's name, as a Python name too, and what makes it on a device."""

    op: Op
    shape: str
    dtype: str
    make: Callable[[torch.device, torch.dtype], Sample]

    @property
    def identifier(self) -> str:
        return identifier(self.shape)

    def sample(self, device: torch.device) -> Sample:
        torch.manual_seed(0)
        return self.make(device, getattr(torch, self.dtype))


def identifier(shape: str) -> str:
    """A shape's name in small letters, digits and underscores."""
    return re.sub(r"\W+", "_", shape.lower()).strip("_")


def calls(ops: list[Op], dtype: str, device: torch.device, parts: list[str]) -> tuple[list[Exported], list[str]]:
    """The calls whose shapes' names contain one of ``parts``; and those that are left out, with the reason.

    On a CPU an op has the shapes for CPUs alone, where it has such.
    """
    found, left_out = [], []
    for op in ops:
        shapes: Mapping[str, Callable] = cases.shapes_of(op.name) or {}
        if device.type == "cpu":
            shapes = cases.cpu_shapes_of(op.name) or shapes
        for shape, make in shapes.items():
            if not any(part in shape for part in parts):
                continue
            # Two draws of a mask are never equal.
            if make(torch.device("meta"), torch.float32).kwargs.get("dropout_p"):
                left_out.append(f"{op.name}, {shape}: it has dropout, and other benchmarks compare without a seed")
            else:
                found.append(Exported(op, shape, dtype, make))
    return found, left_out


def main(argv: list[str]) -> int:
    """The command line. Returns the exit code."""
    parser = Parser(prog="fastllm bench export", description="Write the ops' calls as other benchmarks read them.")
    parser.add_argument(
        "format", choices=("kernels", "flashinfer"),
        help="kernels: a folder for Hugging Face's `kernels benchmark`; flashinfer: a data set of FlashInfer-Bench",
    )  # fmt: skip
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to write (all)")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="a folder that is new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="shapes for a CPU or a GPU (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=path, metavar="BENCH.JSON",
        help="flashinfer: times of this run as traces; their errors are measured now, on --device",
    )  # fmt: skip
    options: argparse.Namespace = parser.parse_args(argv)
    device = torch.device(options.device)
    try:
        if options.run and options.format != "flashinfer":
            raise ValueError("--run: the format kernels has no times; leave it out")
        run = read_run(options.run) if options.run else None
        if device.type == "cuda" and not torch.cuda.is_available() and run:
            raise ValueError("--device: there is no GPU here to measure the traces' errors on")
        found, left_out = calls(cases.selected(options.ops), options.dtype, device, options.shape)
        if not found:
            raise ValueError(f"--shape: no shape of these ops has {' or '.join(map(repr, options.shape))} in its name")
        folder: Path = options.out
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out: {folder} is not an empty folder")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.format == "kernels":
        from .export_kernels import write
    else:
        from .export_flashinfer import write
    done = write(found, folder, device, run)
    for line in left_out:
        print(f"left out: {line}")
    print(f"written: {folder}, {done}")
    return 0
