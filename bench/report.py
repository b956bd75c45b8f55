"""What a run's rows look like, and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .run import NOT_INSTALLED, OURS, Row
from .timing import Quartiles


def read_rows(file: Path) -> list[Row]:
    """The rows of a bench.json.

    Raises:
        ValueError: it is not one.
    """
    try:
        return [Row(**row) for row in json.loads(file.read_text())["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a bench.json ({error})") from error


def console() -> Console:
    """As wide as the terminal, or wide enough for every table where there is none."""
    return Console(width=None if Console().is_terminal else 180)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-2 else f"{seconds * 1e6:,.0f}"


@dataclass(frozen=True)
class Case:
    """All providers of one call in one direction."""

    rows: Sequence[Row]

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.provider == OURS and row.samples), None)

    @property
    def best_rival(self) -> Row | None:
        timed = [row for row in self.rows if row.provider != OURS and row.samples]
        return min(timed, key=lambda row: row.seconds.median, default=None)

    @property
    def lead(self) -> float:
        """How many times as fast we are as the best other provider; 0 where we have no time."""
        ours, rival = self.ours, self.best_rival
        if ours is None:
            return 0.0
        return rival.seconds.median / ours.seconds.median if rival is not None else float("inf")


def in_cases(rows: Iterable[Row]) -> list[Case]:
    """The rows by call and direction, where we lose first."""
    ordered = sorted(rows, key=lambda row: row.case)
    return sorted((Case(list(group)) for _, group in groupby(ordered, key=lambda row: row.case)), key=lambda c: c.lead)


def _absent(row: Row) -> bool:
    return (row.problem or "").startswith(NOT_INSTALLED)


def table(rows: Iterable[Row], environment: dict) -> Table:
    """A line for each provider, our losses first; each time is a median with its quartiles."""
    rates = environment["rates"]
    shown = Table(
        "op", "shape", "dtype", "pass", "provider", "us", "quartiles", "fastllm is", "GB/s", "% copy", "TFLOP/s",
        "% matrix", "peak MB", "first call s",
        title=f"{environment['device']}; copy {rates['copy'] / 1e9:,.0f} GB/s, "
        f"matrix {rates['matrix'] / 1e12:,.2f} TFLOP/s",
    )  # fmt: skip
    for case in in_cases(rows):
        timed = sorted((row for row in case.rows if row.samples), key=lambda row: row.seconds.median)
        for row in timed:
            q, ours = row.seconds, case.ours
            bandwidth, rate = row.least_bytes / q.median, row.flops / q.median
            lead = "" if ours is None or row is ours else f"{q.median / ours.seconds.median:.2f}x"
            shown.add_row(
                *row.case, row.provider, _duration(q.median), f"{_duration(q.low)} to {_duration(q.high)}", lead,
                f"{bandwidth / 1e9:,.1f}", f"{bandwidth / rates['copy']:.0%}",
                f"{rate / 1e12:,.2f}" if row.flops else "", f"{rate / rates['matrix']:.0%}" if row.flops else "",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}", f"{row.first_call:.2f}",
                style="bold" if row.provider == OURS else None,
            )  # fmt: skip
        for row in case.rows:
            if not row.samples and not _absent(row):
                shown.add_row(*row.case, row.provider, "no time", row.problem)
        shown.add_section()
    return shown


def show(rows: Sequence[Row], left_out: Sequence[str], environment: dict) -> None:
    """Prints the table and what was left out."""
    out = console()
    if rows:
        out.print(table(rows, environment))
    for provider, problem in sorted({(row.provider, row.problem) for row in rows if _absent(row)}):
        out.print(f"{provider}: {problem}", highlight=False)
    for line in left_out:
        out.print(f"left out: {line}", highlight=False)


def verdict(before: Quartiles, after: Quartiles) -> str:
    """ "faster" or "slower" where the quartile ranges do not meet, else "within the noise"."""
    if after.high < before.low:
        return "faster"
    if after.low > before.high:
        return "slower"
    return "within the noise"


def comparison(before: Iterable[Row], after: Iterable[Row]) -> list[tuple[Row | None, Row | None, str]]:
    """(before, after, verdict) by case and provider, what became slower first; None where a run lacks the row."""
    sides = [{(*row.case, row.provider): row for row in rows if row.samples} for rows in (before, after)]
    found = []
    for key in sorted(sides[0].keys() | sides[1].keys()):
        a, b = sides[0].get(key), sides[1].get(key)
        found.append((a, b, verdict(a.seconds, b.seconds) if a and b else "only in one"))

    def change(entry) -> float:
        a, b, _ = entry
        return a.seconds.median / b.seconds.median if a and b else float("inf")

    return sorted(found, key=change)


def compare(before: Path, after: Path) -> None:
    """Prints two runs side by side, what became slower first.

    Raises:
        OSError, ValueError: a file cannot be read, or is no bench.json.
    """
    shown = Table("op", "shape", "dtype", "pass", "provider", f"{before} us", f"{after} us", "speed-up", "verdict")
    for a, b, words in comparison(read_rows(before), read_rows(after)):
        row = a or b
        times = ["" if r is None else _duration(r.seconds.median) for r in (a, b)]
        ratio = f"{a.seconds.median / b.seconds.median:.2f}x" if a and b else ""
        style = {"faster": "green", "slower": "red"}.get(words)
        shown.add_row(*row.case, row.provider, *times, ratio, words, style=style)
    console().print(shown)
