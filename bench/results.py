"""What a run leaves: its rows, the calls that they belong to, and the JSON that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path

from .timing import Quartiles

OURS, EAGER, COMPILED = "fastllm", "eager", "torch.compile"
NOT_INSTALLED = "not installed"
NOT_COMPILED = "not compiled: the share of the budget for compiling was spent"


@dataclass(frozen=True)
class Row:
    """One provider in one direction of one call. Seconds and bytes; ``problem`` says why there are no samples.

    ``cache``: "cold" where the L2 cache was overwritten before each sample, else "hot". ``host`` are seconds that the
    host spends on a call, device not waited for. On a GPU ``samples`` are the device's alone, except where ``waits``
    says that the call itself waits for the device. ``first_call`` is the first one's, with what it compiles. ``axis``
    and ``size`` are those of a sweep.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    provider: str
    problem: str | None = None
    samples: list[float] = field(default_factory=list)
    least_bytes: int = 0
    flops: int = 0
    first_call: float | None = None
    peak_bytes: int | None = None
    cache: str = "hot"
    host: list[float] = field(default_factory=list)
    waits: bool = False
    axis: str | None = None
    size: int | None = None

    @property
    def case(self) -> tuple[str, str, str, str, str]:
        return self.op, self.shape, self.dtype, self.direction, self.cache

    @property
    def seconds(self) -> Quartiles:
        return Quartiles.of(self.samples)

    @property
    def missing(self) -> bool:
        """Whether the provider is not installed, or was not compiled for want of time: nothing that it did."""
        return (self.problem or "").startswith((NOT_INSTALLED, NOT_COMPILED))


@dataclass
class Run:
    """What ``fastllm bench`` finds: where it ran, every row, and what was left out and why."""

    environment: dict
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def matrix_rate(rates: Mapping[str, float], dtype: str) -> float:
    """FLOP/s of matrix products in ``dtype``; where only one rate was measured, that one."""
    return rates.get(f"matrix {dtype}", rates["matrix"])


def read_run(file: Path) -> Run:
    """A bench.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rates = found["environment"]["rates"]
        if not (rates["copy"] > 0 and rates["matrix"] > 0 and found["environment"]["device"]):
            raise ValueError("no rates")
        known = {field.name for field in fields(Row)}
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in found["rows"]]
        return Run(found["environment"], rows, list(found["left_out"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a bench.json ({error})") from error


@dataclass(frozen=True)
class Case:
    """One direction of one call: every provider's row."""

    rows: list[Row]

    def of(self, provider: str) -> Row | None:
        """The provider's row, if it has a time."""
        return next((row for row in self.rows if row.provider == provider and row.samples), None)

    @property
    def ours(self) -> Row | None:
        return self.of(OURS)

    @property
    def best_rival(self) -> Row | None:
        timed = [row for row in self.rows if row.provider != OURS and row.samples]
        return min(timed, key=lambda row: row.seconds.median, default=None)

    def lead_over(self, rival: Row | None) -> float | None:
        """How many times as fast we are as ``rival``; None where one of the two has no time."""
        if rival is None or self.ours is None:
            return None
        return rival.seconds.median / self.ours.seconds.median

    @property
    def lead(self) -> float:
        """How many times as fast we are as the best other provider; 0 where we have no time."""
        if self.ours is None:
            return 0.0
        lead = self.lead_over(self.best_rival)
        return float("inf") if lead is None else lead


def in_cases(rows: Iterable[Row]) -> list[Case]:
    """The rows by call and direction, where we lose first."""
    ordered = sorted(rows, key=lambda row: row.case)
    return sorted((Case(list(group)) for _, group in groupby(ordered, key=lambda row: row.case)), key=lambda c: c.lead)
