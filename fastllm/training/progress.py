"""What a run tells while it goes: a live display, metrics.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..files import naming, write_text

# Seconds between plain lines where the output is not a terminal.
LINE_INTERVAL = 5.0


def printable(text: str) -> str:
    """``text`` without control characters but newline and tab: what a model writes may hold terminal commands."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Metrics:
    """metrics.jsonl, one JSON object a line, and the same numbers to TensorBoard where it is installed.

    A training line has step, tokens, seconds (of training), loss (nats per token, exact over the whole batch),
    lr and muon_lr (the learning rates), grad_norm (before clipping) and tokens_per_second; an evaluation line has
    step, tokens, seconds, validation_loss, validation_bits_per_byte and validation_tokens (how many were scored).
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        self._path = folder / "metrics.jsonl"
        # A run that was killed may have written beyond its last checkpoint; those steps come again.
        kept = [line for line in read_metrics(self._path) if line["step"] <= resume_step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, lines: list[dict[str, Any]]) -> None:
        with naming(self._path):
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        if self._board is not None:
            for line in lines:
                for key in line.keys() - {"step", "tokens", "seconds"}:
                    self._board.add_scalar(key, line[key], line["step"])

    def close(self) -> None:
        # After a failed write, closing tries again and fails again: the first error is the one to see.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off is left out. No file: no lines."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Display:
    """Progress on the terminal: a live line there, plain lines elsewhere. ``quiet`` shows nothing."""

    def __init__(self, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
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
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str = "") -> None:
        """A line that stays."""
        with naming("standard output"):
            self.console.print(printable(text), markup=False)

    def update(self, done: float, text: str, force: bool = False) -> None:
        """The state of things; where there is no terminal, a line every few seconds, or at once with ``force``."""
        if self._live is not None:
            self._live.update(self._task, completed=min(done, 1.0), description=text)
        elif force or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL
            self.say(f"{min(done, 1.0):4.0%}  {text}")
