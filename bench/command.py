"""The command line of ``fastllm bench``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

from .. import cpu
from ..commands.parser import Parser
from ..config import path
from ..matmul import matmul_flops
from ..registry import Op
from . import cases, levels
from .environment import environment
from .results import Run, read_run
from .rival import Rival
from .run import ROUNDS, Planned, plan, run
from .scores import write
from .timing import copy_bandwidth, keep_freed_memory

# Seconds kept for the table, the plots and the page.
DRAWING = 15.0
DTYPES = ("bfloat16", "float16", "float32")
EPILOG = """
fastllm bench compare A.json B.json   two runs side by side, with a verdict a row
fastllm bench report A.json           the plots and the page of a run again (--out FOLDER: elsewhere)
fastllm bench train --help            the training step
fastllm bench regress FILE            anybody's Triton kernels held to a committed file, without a GPU
fastllm bench export FORMAT           the ops' calls for Hugging Face's `kernels benchmark` or FlashInfer-Bench
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastllm bench",
        description="Time the ops beside eager PyTorch, torch.compile and the rivals that are installed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (all); or one of the commands below")
    parser.add_argument("--static", action="store_true", help="what is known without running: compiled kernels, model")
    parser.add_argument(
        "--tune", action="store_true", help="search launch settings on this GPU; rewrites kernels/tuned.py"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES,
        help="(bfloat16; float32 on a CPU that has no products of bfloat16)",
    )  # fmt: skip
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--sweep", action="store_true", help="after the shapes, sizes for GB/s and TFLOP/s over them")
    parser.add_argument("--provider", nargs="+", default=[], help="beside fastllm and eager, only these")
    parser.add_argument(
        "--rival", action="append", default=[], metavar="MODULE:FUNCTION",
        help="a function of yours with OP's arguments, or FILE.py:FUNCTION, as one more provider; may be repeated",
    )  # fmt: skip
    parser.add_argument("--compile", nargs="+", metavar="OP", help="torch.compile only beside these ops (beside all)")
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="for everything (%(default)g)")
    parser.add_argument(
        "--cpu", metavar="LEVELS",
        help="one table of several levels of this CPU, each in a process of its own: avx2,avx512,amx",
    )  # fmt: skip
    parser.add_argument(
        "--fresh-caches", action="store_true",
        help="nothing that Triton and Inductor have compiled before, so that the first calls compile",
    )  # fmt: skip
    parser.add_argument("--out", type=path, metavar="FOLDER", help="for the results (default: runs/bench-<time>)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        from . import train

        train.main(argv[1:])
        return 0
    if argv[:1] == ["regress"]:
        from .regress import main as regress

        return regress(argv[1:])
    if argv[:1] == ["export"]:
        from .export import main as export

        return export(argv[1:])
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.ops[:1] == ["compare"]:
            return _compare(options.ops[1:])
        if options.ops[:1] == ["report"]:
            return _report(options.ops[1:], options.out)
        ops = cases.selected(options.ops)
        compiled = {op.name for op in cases.selected(options.compile or [])}
        if options.rounds is not None and options.rounds < 2:
            raise ValueError(f"--rounds: expected at least 2, got {options.rounds}")
        if not options.budget > 0:
            raise ValueError(f"--budget: expected a positive number of seconds, got {options.budget:g}")
        device = _device(options.device)
        if options.cpu is not None:
            names = levels.levels(options.cpu)
            if device.type != "cpu" or options.static or options.tune:
                raise ValueError("--cpu: it times the ops on a CPU; leave out --static and --tune, take --device cpu")
        options.dtype = options.dtype or [cpu.precision(device)]
        planned = plan(ops, options.shape, options.sweep, device.type)
        if not planned:
            raise ValueError(f"--shape: no shape of these ops has {' or '.join(map(repr, options.shape))} in its name")
        rivals = _rivals(options.rival, ops, planned, device)
        if options.tune:
            from .tune import main as tune

            return tune(ops, options.dtype, options.shape)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.static:
        from .static import both_tables

        return both_tables([op.name for op in ops], options.shape, options.budget)
    began = time.monotonic()
    if options.cpu is not None:
        folder = options.out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
        return levels.main(names, argv, options.budget, folder)
    folder = options.out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"
    kept = keep_freed_memory()
    with tempfile.TemporaryDirectory() as caches:
        if options.fresh_caches:
            os.environ |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        matrix = {f"matrix {dtype}": matmul_flops(device, getattr(torch, dtype)) for dtype in options.dtype}
        rates = {"copy": copy_bandwidth(device), "matrix": matrix[f"matrix {options.dtype[0]}"], **matrix}
        where = environment(device) | {"rates": rates, "fresh_caches": options.fresh_caches, "keeps_freed_memory": kept}
        left = max(0.0, options.budget - (time.monotonic() - began) - min(DRAWING, options.budget / 4))
        found = run(
            planned, device, dtypes=options.dtype, rounds=options.rounds or ROUNDS[device.type],
            budget=left, only=options.provider, compiled=compiled, environment=where,
            rivals=rivals, keep=lambda found: write(found, file),
        )  # fmt: skip
    for rival in rivals:
        rival.stop()
    write(found, file)
    print("written:", file, *_shown(found, folder))
    refused = {row.provider: row.problem for row in found.rows if row.provider in options.rival and row.problem}
    for name, problem in refused.items():
        print(f"fastllm bench: {name} has no time in some calls: {problem}", file=sys.stderr)
    return 0 if any(row.samples for row in found.rows) and not refused else 1


def _rivals(targets: list[str], ops: list[Op], planned: list[Planned], device: torch.device) -> list[Rival]:
    """One for each of ``targets``, which has been imported and takes some of the calls."""
    if targets and len(ops) != 1:
        raise ValueError(f"--rival: expected one OP, whose arguments it takes, got {len(ops)} ops")
    if len(set(targets)) != len(targets):
        raise ValueError("--rival: the same function is named twice")
    samples = [case.make(torch.device("meta"), torch.float32) for case in planned]
    found = [Rival(target, device) for target in targets]
    for rival in found:
        rival.check(ops[0], samples)
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from error
    if device.type not in ROUNDS:
        raise ValueError(f"--device: expected {' or '.join(ROUNDS)}, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: there is no GPU here (torch.cuda.is_available() is False)")
    return device


def _shown(found: Run, folder: Path) -> list[Path]:
    """Prints the table, draws plots and page; what cannot be had without a package that is missing is said."""
    from .page import write_page

    try:
        from .report import show

        show(found)
    except ModuleNotFoundError as error:
        print(f"no table: the package {error.name} is not installed")
    pictures: dict[str, bytes] = {}
    try:
        from .plots import plots

        pictures = plots(found)
    except ModuleNotFoundError as error:
        print(f"no plots: the package {error.name} is not installed")
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    return [*(folder / f"{name}.png" for name in pictures), write_page(found, pictures, folder / "bench.html")]


def _compare(files: list[str]) -> int:
    if len(files) != 2:
        raise ValueError("compare: expected two files")
    from .report import compare

    compare(*map(Path, files))
    return 0


def _report(files: list[str], folder: Path | None) -> int:
    if len(files) != 1:
        raise ValueError("report: expected one file")
    file = Path(files[0])
    found = read_run(file)
    folder = folder or file.parent
    folder.mkdir(parents=True, exist_ok=True)
    print("written:", *_shown(found, folder))
    return 0
