"""What a run's rows look like, and two runs side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import OURS, Row, Run, in_cases, matrix_rate, read_run
from .scores import fast_p
from .timing import Quartiles


def console(columns: int = 210) -> Console:
    """As wide as the terminal, or ``columns`` wide where there is none; every table of a run fits in the default."""
    return Console(width=None if Console().is_terminal else columns)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-2 else f"{seconds * 1e6:,.0f}"


def table(rows: Iterable[Row], environment: dict) -> Table:
    """A line for each provider, our losses first; each time is a median with its quartiles."""
    rates = environment["rates"]
    shown = Table(
        "op", "shape", "dtype", "pass", "cache", "provider", "us", "quartiles", "fastllm is", "GB/s", "% copy",
        "TFLOP/s", "% matrix", "host us", "peak MB", "first call s",
        title=f"{environment['device']}; copy {rates['copy'] / 1e9:,.0f} GB/s, "
        f"matrix {rates['matrix'] / 1e12:,.2f} TFLOP/s",
    )  # fmt: skip
    for case in in_cases(rows):
        timed = sorted((row for row in case.rows if row.samples), key=lambda row: row.seconds.median)
        for row in timed:
            q, ours = row.seconds, case.ours
            bandwidth, rate = row.least_bytes / q.median, row.flops / q.median
            share = rate / matrix_rate(rates, row.dtype)
            lead = "" if ours is None or row is ours else f"{q.median / ours.seconds.median:.2f}x"
            shown.add_row(
                *row.case, row.provider, _duration(q.median), f"{_duration(q.low)} to {_duration(q.high)}", lead,
                f"{bandwidth / 1e9:,.1f}", f"{bandwidth / rates['copy']:.0%}",
                f"{rate / 1e12:,.2f}" if row.flops else "", f"{share:.0%}" if row.flops else "",
                _duration(Quartiles.of(row.host).median) if row.host else "",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}", f"{row.first_call:.2f}",
                style="bold" if row.provider == OURS else None,
            )  # fmt: skip
        for row in case.rows:
            if not row.samples and not row.missing:
                shown.add_row(*row.case, row.provider, "no time", row.problem)
        shown.add_section()
    return shown


def show(run: Run) -> None:
    """Prints the table and what was left out."""
    out = console()
    if run.rows:
        out.print(table(run.rows, run.environment))
    for provider, score in fast_p(run.rows).items():
        shares = ", ".join(f"{share:.2f} (p = {p})" for p, share in score["fast_p"].items())
        out.print(f"fast_p of {provider} over eager: {shares}; {score['right']} of {score['calls']} calls right")
    for provider, problem in sorted({(row.provider, row.problem) for row in run.rows if row.missing}):
        out.print(f"{provider}: {problem}", highlight=False)
    unbegun = [line for line in run.left_out if line.endswith("was spent")]
    for line in run.left_out:
        if line not in unbegun:
            out.print(f"left out: {line}", highlight=False)
    if unbegun:
        out.print(
            f"not begun before {unbegun[0].rpartition(': ')[2]}: {len(unbegun)} calls, which the results name; "
            "--budget, or fewer ops, reaches them",
            highlight=False,
        )


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
    shown = Table(
        "op", "shape", "dtype", "pass", "cache", "provider", f"{before} us", f"{after} us", "speed-up", "verdict"
    )  # fmt: skip
    for a, b, words in comparison(read_run(before).rows, read_run(after).rows):
        row = a or b
        assert row is not None, "one run has it"
        times = ["" if r is None else _duration(r.seconds.median) for r in (a, b)]
        ratio = f"{a.seconds.median / b.seconds.median:.2f}x" if a and b else ""
        style = {"faster": "green", "slower": "red"}.get(words)
        shown.add_row(*row.case, row.provider, *times, ratio, words, style=style)
    console().print(shown)
