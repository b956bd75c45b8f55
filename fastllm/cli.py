"""The command line: parsing, and what becomes of errors. The commands are in :mod:`fastllm.commands`.

Exit codes: 0 done; 1 a run failed (disk full, loss not finite); 2 the input was refused before any work; 130 and 143
stopped by SIGINT and SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

from .commands import COMMANDS
from .config import InputError
from .version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse's, with errors on one line, no abbreviated flags, and the nearest flag to one that does not exist."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, extras = super().parse_known_args(args, namespace)
        if extras:
            near = difflib.get_close_matches(extras[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(extras)}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace, extras

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of the commands only ``command`` knows its arguments, so that no other one is imported."""
    parser = _Parser(prog="fastllm", description="Train and use a language model built on fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == command:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` without the program's name, default sys.argv's."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from .bench.command import main as bench

        return bench(argv[1:])
    arguments = _parser(argv[0] if argv else None).parse_args(argv)
    from .registry import BackendError, chosen_backend

    try:
        with _one_line_warnings():
            try:
                chosen_backend()
            except ValueError as error:
                raise InputError(str(error)) from error
            return arguments.execute(arguments)
    except (InputError, BackendError) as error:
        code, message = 2, str(error)
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        code, message = 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except (RuntimeError, MemoryError) as error:
        from .training import Failed

        code, message = 1, str(error)
        # torch has a class of its own for a full GPU, and only a message for full host memory.
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate|not enough memory", message):
            message = f"out of memory; a smaller model or --micro-batch-size needs less ({message})"
        elif not isinstance(error, Failed):
            raise
    print(f"fastllm {arguments.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
