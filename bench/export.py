"""``fastllm bench export``: the ops' calls as other benchmarks read them.

``kernels`` is a folder for ``kernels benchmark`` of Hugging Face's package kernels, ``flashinfer`` a data set of
FlashInfer-Bench. Both call the ops of this package, so it has to be installed where they run. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..config import path
from ..parser import Parser
from . import cases, export_flashinfer, export_kernels
from .exported import calls
from .results import read_run

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``fastllm bench export``."""
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
    return parser


def main(argv: list[str]) -> int:
    """The command line. Returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
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
    written = export_kernels if options.format == "kernels" else export_flashinfer
    done = written.write(found, folder, device, run)
    for line in left_out:
        print(f"left out: {line}")
    print(f"written: {folder}, {done}")
    return 0
