"""The command line: parsing, and what becomes of errors. The commands are in :mod:`fastllm.commands`.

Exit codes: 0 done; 1 a run failed (disk full, loss not finite); 2 the input was refused before any work; 129, 130 and
143 stopped by SIGHUP, SIGINT and SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

from . import other_work
from .commands import COMMANDS, WITHOUT_TORCH
from .config import InputError
from .parser import Parser
from .version import __version__

# Arguments that may be empty.
TEXTS = ("prompt", "text", "texts", "question", "context")
# Signals that end a process. Python turns SIGINT into KeyboardInterrupt itself.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of the commands only ``command`` knows its arguments, so that no other one is imported."""
    parser = Parser(
        prog="fastllm",
        description="Fast kernels for PyTorch models, and a language model from scratch that is built on them.",
    )
    parser.add_argument("--version", action="version", version=f"fastllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == command:
            if name not in WITHOUT_TORCH:
                import_module(".api", __package__)  # the ops register themselves
            module = import_module(f".commands.{name}", __package__)
            chosen = commands.add_parser(name, help=text, description=module.__doc__)
            module.add_arguments(chosen)
            chosen.set_defaults(execute=module.run)
        else:
            commands.add_parser(name, help=text)
    return parser


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"fastllm: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Ended(BaseException):
    """SIGTERM or SIGHUP came while nothing else waits for it: what is half done is undone on the way out."""


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise, unless the process was told to ignore them (nohup)."""
    before = {}

    def end(number: int, frame: object) -> None:
        raise _Ended(number)

    # A process that torchrun started may be waiting for others in a call that no exception leaves.
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_values(arguments: argparse.Namespace) -> None:
    """No argument but a text may be empty: an unset variable of a script is no file, and not the current folder."""
    for name, value in vars(arguments).items():
        for one in value if isinstance(value, list) else [value]:
            if one == "" and name not in TEXTS:
                raise InputError(f"{name}: expected a value, got an empty one")
            if isinstance(one, str) and re.search("[\ud800-\udfff]", one):
                raise InputError(f"{name}: expected UTF-8, got {one!r}")


def _without_output() -> None:
    """Python would complain once more when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _without_output()


def _failure(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message of what the user or the machine did; None for a fault of this program."""
    if isinstance(error, _Ended):
        return 128 + error.args[0], signal.Signals(error.args[0]).name
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, OSError):
        # No file has such a name: that is the user's input.
        code = 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1
        return code, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    from .backends import BackendError
    from .training import Failed

    message = str(error)
    # torch has a class of its own for a full GPU, and only a message for full host memory.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate|not enough memory", message):
        return 1, f"out of memory; a smaller model or --micro-batch-size needs less ({message or 'no details'})"
    if isinstance(error, BackendError):
        return 2, message
    return (1, message) if isinstance(error, Failed) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` without the program's name, default sys.argv's."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # a model may write what the terminal cannot show
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ending_in_order():
            result = _execute(argv)
            sys.stdout.flush()
            return result
    except SystemExit:
        _flush()
        raise
    except BrokenPipeError:
        _without_output()  # whoever read the output has left
        return 1
    except (_Ended, KeyboardInterrupt, InputError, OSError, RuntimeError, MemoryError) as error:
        failure = _failure(error)
        if failure is None:
            raise
        if isinstance(error, OSError):
            _flush()
        code, message = failure
    print(f"fastllm {argv[0]}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _check_backend() -> None:
    from .backends import chosen_backend

    chosen_backend()  # raises InputError


def _execute(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        import_module(".api", __package__)
        from .bench.command import main as bench

        _check_backend()
        return bench(argv[1:])
    if "torch" not in sys.modules:  # later it changes nothing here, only what this process starts
        other_work.wait_asleep(os.environ)
    parser = build_parser(argv[0] if argv else None)
    if not argv:
        parser.error(f"expected a command: {', '.join(COMMANDS)}; fastllm --help says what each does")
    arguments = parser.parse_args(argv)
    _check_values(arguments)
    with _one_line_warnings():
        if arguments.command not in WITHOUT_TORCH:
            _check_backend()
        return arguments.execute(arguments)
