"""What a run tells while it goes: a live display, metrics.jsonl, TensorBoard where it is installed, and W&B."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ...config import InputError
from ...files import naming, write_text

# Seconds between plain lines where the output is not a terminal. A guess.
LINE_INTERVAL = 5.0
METRICS = "metrics.jsonl"
# Where the host spends a step: making the batch, the parts before the last exchange, up to the gradient's norm, update.
PHASES = ("data", "forward", "backward", "update")


def printable(text: str) -> str:
    """``text`` without control characters but newline and tab: what a model writes may hold terminal commands."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Metrics:
    """metrics.jsonl, one JSON object a line; the same numbers to TensorBoard where it is installed, and to W&B.

    A training line has step, tokens, seconds (of training), loss (nats per token, exact over the whole batch; null
    where it is not finite), the loss's terms, lr and muon_lr (the learning rates), grad_norm (before clipping),
    data_seconds, forward_seconds, backward_seconds and update_seconds (of the host, see Timer), rank_skew_seconds and
    slowest_rank (with several ranks), skipped (so far; and skipped_because), tokens_per_second and mfu. An evaluation
    line has step, tokens, seconds, validation_loss, validation_tokens (how many were scored) and the scores.

    A line that cannot be written, the disk being full, waits for the next time; an error is raised by :meth:`close`.

    Args:
        wandb: a W&B project to log to as well.

    Raises:
        InputError: W&B was asked for and is not installed.
    """

    def __init__(self, folder: Path, resume_step: int = 0, wandb: str | None = None):
        self._path = folder / METRICS
        # A run that was killed may have written beyond its last checkpoint; those steps come again.
        kept = [line for line in read_metrics(self._path) if line["step"] <= resume_step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._waiting = ""
        self._error: OSError | None = None
        self._board = self._wandb = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        if wandb is not None:
            self._wandb = _wandb_run(folder, wandb)

    def write(self, lines: list[dict[str, Any]]) -> None:
        self._waiting += "".join(json.dumps(line) + "\n" for line in lines)
        self._append()
        for line in lines:
            numbers = {
                key: value
                for key, value in line.items()
                if key not in ("step", "tokens", "seconds") and isinstance(value, int | float)
            }
            if self._board is not None:
                for key, value in numbers.items():
                    self._board.add_scalar(key, value, line["step"])
            if self._wandb is not None:
                self._wandb.log(numbers, step=line["step"])

    def _append(self) -> None:
        """Add what waits to the file; what a full disk cut off is taken back, so that a line is whole or not there."""
        try:
            with naming(self._path), open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                content = self._waiting.encode()
                try:
                    if file.write(content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            self._error = error
        else:
            self._waiting, self._error = "", None

    def close(self) -> None:
        """Write what still waits.

        Raises:
            OSError: it cannot be written.
        """
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._waiting:
            self._append()
        if self._error is not None:
            raise self._error


def find_wandb(project: str | None) -> None:
    """Refuse ``project`` where W&B is not installed.

    Raises:
        InputError: it is not.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("wandb: a project was given, but W&B is not installed (pip install wandb)")


def _wandb_run(folder: Path, project: str):
    find_wandb(project)
    import wandb  # pyright: ignore[reportMissingImports]  # installed by whoever uses it

    # Of the folder's own, so that a run that goes on goes on there, too.
    name = folder / "wandb-id"
    if not name.exists():
        write_text(name, secrets.token_hex(8))
    return wandb.init(
        project=project, name=folder.name, dir=str(folder), id=name.read_text("utf-8").strip(), resume="allow"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that was cut off or damaged. No file: no lines."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Where rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Display:
    """Progress on the terminal: a live line there, plain lines elsewhere. ``quiet`` shows nothing.

    Where standard output fails, whoever read it being gone or its disk full, that is told of on standard error, and
    the work goes on unseen.
    """

    def __init__(self, quiet: bool = False):
        self.console = _Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._task = None
        self._next_line = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.console.quiet:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False))
            percentage = TextColumn("{task.percentage:3.0f}%")
            self._live = Progress(BarColumn(16), percentage, text, console=self.console, refresh_per_second=4)
            self._task = self._live.add_task("", total=1.0)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            with self._lossy():
                live.stop()

    @contextlib.contextmanager
    def _lossy(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.console.quiet = True
            # What it has buffered would fail again, at exit at the latest.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.warn(f"standard output: {error.strerror}; nothing more is shown")

    def say(self, text: str = "") -> None:
        """A line that stays."""
        with self._lossy():
            self.console.print(printable(text), markup=False)

    def warn(self, text: str) -> None:
        """A line on standard error, also where nothing else is shown."""
        with contextlib.suppress(OSError):
            _Console(stderr=True, highlight=False, soft_wrap=True).print(f"fastllm: warning: {text}", markup=False)

    def update(self, done: float, text: str, force: bool = False) -> None:
        """The state of things; where there is no terminal, a line every few seconds, or at once with ``force``."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=min(done, 1.0), description=text)
        elif force or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL
            self.say(f"{min(done, 1.0):4.0%}  {text}")
