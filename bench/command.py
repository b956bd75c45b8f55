"""The command line of ``fastllm bench``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch

from .. import cpu
from ..config import path
from ..matmul import matmul_flops
from ..parser import Parser
from ..registry import Op
from . import cases, levels
from .environment import environment
from .results import Run, read_run
from .rival import Rival
from .run import ROUNDS, Planned, Request, plan, providers, run
from .scores import write
from .timing import copy_bandwidth, keep_freed_memory

# Seconds kept for the table, the plots and the page.
DRAWING = 15.0
DTYPES = ("bfloat16", "float16", "float32")
EPILOG = """
commands (each has --help):
  fastllm bench compare A.json B.json  two runs side by side, with a verdict in each row
  fastllm bench report A.json          draw the plots and the page of a run again
  fastllm bench train                  the bundled model's training step beside plain PyTorch
  fastllm bench regress FILE           compare what anybody's Triton kernels take with a committed file, without a GPU
  fastllm bench export FORMAT          write the ops' calls for Hugging Face's kernels or for FlashInfer-Bench
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``fastllm bench``."""
    parser = Parser(
        prog="fastllm bench",
        description="Time the ops beside eager PyTorch, torch.compile and the rivals that are installed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all), or one of the commands below")
    parser.add_argument(
        "--static", action="store_true", help="what is known without a GPU: compiled kernels and a model of their time"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search launch settings on this GPU; rewrites kernels/tuned.py"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES,
        help="precisions (default: bfloat16; float32 on a CPU that has no products of bfloat16)",
    )  # fmt: skip
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument(
        "--sweep", action="store_true", help="after the shapes, a series of sizes, for GB/s and TFLOP/s over the size"
    )
    parser.add_argument(
        "--provider",
        nargs="+",
        default=[],
        help="time only these beside fastllm and eager PyTorch; eager: none but those",
    )
    parser.add_argument(
        "--rival", action="append", default=[], metavar="MODULE:FUNCTION",
        help="a function of yours with OP's arguments, or FILE.py:FUNCTION, as one more provider; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="+", metavar="OP", help="time torch.compile beside these ops only (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N",
        help=f"samples of each provider (default: {ROUNDS['cpu']} on a CPU, {ROUNDS['cuda']} on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=240.0, metavar="SECONDS", help="time for everything (default: %(default)g)"
    )
    parser.add_argument(
        "--cpu", metavar="LEVELS",
        help="one table of several levels of this CPU, each in a process of its own: avx2,avx512,amx",
    )  # fmt: skip
    parser.add_argument(
        "--fresh-caches", action="store_true",
        help="ignore what Triton and Inductor have compiled before, so that the first calls compile",
    )  # fmt: skip
    parser.add_argument("--out", type=path, metavar="FOLDER", help="for the results (default: runs/bench-<time>)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = build_parser()
    options = parser.parse_args(argv)
    with _named_errors(parser):
        ops = cases.selected(options.ops)
        device = _checked(options)
        planned = plan(ops, options.shape, options.sweep, device.type)
        if not planned:
            raise ValueError(f"--shape: no shape of these ops has {' or '.join(map(repr, options.shape))} in its name")
        known = {name: None for case in planned for name in providers(case.op)}
        for name in options.provider:
            if name not in known:
                raise ValueError(f"--provider: expected some of {', '.join(known)}; got {name!r}")
        rivals = _rivals(options.rival, ops, planned, device)
        if options.tune:
            from .tune import main as tune

            return tune(ops, options.dtype, options.shape)
    if options.static:
        from .static import both_tables

        return both_tables([op.name for op in ops], options.shape, options.budget)
    folder = options.out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    if options.cpu is not None:
        return levels.main(levels.levels(options.cpu), argv, options.budget, folder)
    found = _timed(options, planned, device, rivals, folder)
    refused = {row.provider: row.problem for row in found.rows if row.provider in options.rival and row.problem}
    for name, problem in refused.items():
        print(f"fastllm bench: {name} has no time in some calls: {problem}", file=sys.stderr)
    return 0 if any(row.samples for row in found.rows) and not refused else 1


def _checked(options: argparse.Namespace) -> torch.device:
    """The device of ``options``, whose ``compile`` becomes ops, and ``dtype`` the default where none is given.

    Raises:
        ValueError: an option has a value that cannot be used, or not beside another.
    """
    options.compile = cases.selected(options.compile or [])
    if options.rounds is not None and options.rounds < 2:
        raise ValueError(f"--rounds: expected at least 2, got {options.rounds}")
    if not options.budget > 0:
        raise ValueError(f"--budget: expected a positive number of seconds, got {options.budget:g}")
    device = _device(options.device)
    if options.cpu is not None:
        levels.levels(options.cpu)
        if device.type != "cpu" or options.static or options.tune:
            raise ValueError("--cpu: it times the ops on a CPU; leave out --static and --tune, take --device cpu")
    options.dtype = options.dtype or [cpu.precision(device)]
    return device


def _timed(
    options: argparse.Namespace, planned: list[Planned], device: torch.device, rivals: list[Rival], folder: Path
) -> Run:
    """The calls timed within ``options.budget`` seconds; writes the times, the plots and the page to ``folder``."""
    began = time.monotonic()
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
        request = Request(
            options.dtype, options.rounds or ROUNDS[device.type], left, options.provider,
            {op.name for op in options.compile}, rivals,
        )  # fmt: skip
        found = run(planned, device, request, environment=where, keep=lambda found: write(found, file))
    for rival in rivals:
        rival.stop()
    write(found, file)
    print("written:", file, *_shown(found, folder))
    return found


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
    except RuntimeError:  # PyTorch's message lists every kind of device that it knows
        device = None
    if device is None or device.type not in ROUNDS:
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


def _compare(argv: list[str]) -> int:
    parser = Parser(prog="fastllm bench compare", description="Two runs side by side, with a verdict in each row.")
    parser.add_argument("before", type=path, metavar="A.json", help="the bench.json of the run to compare with")
    parser.add_argument("after", type=path, metavar="B.json", help="the bench.json of the run to judge")
    options = parser.parse_args(argv)
    from .report import compare

    with _named_errors(parser):
        compare(options.before, options.after)
    return 0


def _report(argv: list[str]) -> int:
    parser = Parser(prog="fastllm bench report", description="Draw the plots and the page of a run again.")
    parser.add_argument("file", type=path, metavar="A.json", help="the bench.json of the run")
    parser.add_argument("--out", type=path, metavar="FOLDER", help="where to write (default: the folder of A.json)")
    options = parser.parse_args(argv)
    with _named_errors(parser):
        found = read_run(options.file)
        folder = options.out or options.file.parent
        folder.mkdir(parents=True, exist_ok=True)
    print("written:", *_shown(found, folder))
    return 0


def _train(argv: list[str]) -> int:
    from . import train

    train.main(argv)
    return 0


def _regress(argv: list[str]) -> int:
    from .regress import main as regress

    return regress(argv)


def _export(argv: list[str]) -> int:
    from .export import main as export

    return export(argv)


# What imports Triton, plots or tables is imported by the command that needs it.
COMMANDS = {"compare": _compare, "report": _report, "train": _train, "regress": _regress, "export": _export}


@contextlib.contextmanager
def _named_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What the user gave and cannot be used, on one line that names the file or the option."""
    try:
        yield
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        parser.error(str(error))
