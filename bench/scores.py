"""What a run writes: its rows, and intervals of medians and of speed-ups over eager PyTorch, and fast_p.

A median's interval is free of any distribution: between which order statistics it lies is a matter of a fair coin's
throws (H. A. David, H. N. Nagaraja, Order Statistics, 2003, 7.1). fast_p is KernelBench's (A. Ouyang et al., 2025).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .results import EAGER, Row, Run, in_cases
from .timing import Quartiles

# The number grows when a field goes or means something else, not when one comes.
FORMAT = "fastllm-bench/1"
# Of the intervals.
CONFIDENCE = 0.95
# Those at which KernelBench's papers and this library's tables give fast_p.
FAST = (1.0, 1.2, 1.5, 2.0)


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of what ``samples`` are drawn from lies, with a probability of at least CONFIDENCE.

    None for fewer than 6 samples: their smallest and largest have it between them less often.
    """
    n, rank, outside = len(samples), 0, 0.0
    # The largest rank such that fewer than rank samples lie below the median in (1 - CONFIDENCE) / 2 of all draws.
    while rank < n / 2 and (outside := outside + math.comb(n, rank) / 2**n) <= (1 - CONFIDENCE) / 2:
        rank += 1
    if rank == 0:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[n - rank]


def speedups(row: Row, eager: Row | None) -> list[float]:
    """How many times as fast as eager PyTorch, round by round; empty where one of the two has no time."""
    if eager is None or len(row.samples) != len(eager.samples):
        return []
    return [theirs / ours for ours, theirs in zip(row.samples, eager.samples, strict=True)]


def derived(rows: Iterable[Row]) -> dict[int, dict]:
    """``id`` of each row with a time -> its ``median``, ``interval`` and ``speedup`` over eager PyTorch."""
    found = {}
    for case in in_cases(rows):
        for row in case.rows:
            if not row.samples:
                continue
            ratios = speedups(row, case.of(EAGER))
            over = {"median": Quartiles.of(ratios).median, "interval": interval(ratios)} if ratios else None
            found[id(row)] = {"median": row.seconds.median, "interval": interval(row.samples), "speedup": over}
    return found


def fast_p(rows: Iterable[Row]) -> dict[str, dict]:
    """Provider -> ``calls``, ``right`` and ``fast_p``: the share of calls right and more than p times as fast as eager.

    A call is one op, shape and dtype: forward and backward together, or forward alone where there is no backward; with
    a cold cache where that was measured. It counts for every provider that tried it, if eager PyTorch has a time.
    """
    calls: dict[str, list[float]] = {}
    cases = sorted(in_cases(rows), key=lambda case: case.rows[0].case)
    for _, group in groupby(cases, key=lambda case: case.rows[0].case[:3]):
        case = max(group, key=lambda case: (case.rows[0].direction == "both", case.rows[0].cache == "cold"))
        eager = case.of(EAGER)
        if eager is None:
            continue
        for row in case.rows:
            if row.missing or row is eager:
                continue
            # One that is wrong is not fast.
            lead = eager.seconds.median / row.seconds.median if row.samples else 0.0
            calls.setdefault(row.provider, []).append(lead)
    return {
        provider: {
            "calls": len(leads),
            "right": sum(lead > 0 for lead in leads),
            "fast_p": {f"{p:g}": sum(lead > p for lead in leads) / len(leads) for p in FAST},
        }
        for provider, leads in sorted(calls.items())
    }


def document(run: Run) -> dict:
    """What docs/bench.schema.json describes: the run, and what its samples come to beside them."""
    more = derived(run.rows)
    rows = [asdict(row) | more.get(id(row), {}) for row in run.rows]
    found = {"format": FORMAT, **asdict(run), "rows": rows}
    return found | {"confidence": CONFIDENCE, "scores": fast_p(run.rows)}


def write(run: Run, file: Path) -> None:
    """Writes ``run`` to a bench.json."""
    # Strict JSON has no NaN and no Infinity.
    file.write_text(json.dumps(document(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")
