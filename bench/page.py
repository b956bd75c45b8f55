"""One self-contained HTML page of a run: our losses first, tables that sort and filter, the plots."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from .results import COMPILED, EAGER, Row, Run, in_cases, matrix_rate
from .timing import Quartiles

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c0392b; --good: #1e8449; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff7b6b; --good: #58d68d; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; }
th { position: sticky; top: 0; background: Canvas; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.wide { overflow-x: auto; max-height: 80vh; overflow-y: auto; }
.loss { color: var(--bad); font-weight: 600; } .win { color: var(--good); }
img { max-width: 100%; background: white; } input { font: inherit; width: 24rem; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; }
"""

# A cell's data-value is what it sorts by; an empty one comes last either way.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const number = head.classList.contains("number");
    const order = (a, b) => number ? a - b : a.localeCompare(b);
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return down ? order(y, x) : order(x, y);
    }));
  }));
  const filter = document.querySelector(`input[data-table="${table.id}"]`);
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\\s+/);
    for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}
"""


class Cell:
    """Text as shown, and what it sorts by where that is another."""

    def __init__(self, text: str, value: float | None = None, style: str = ""):
        self.text, self.value, self.style = text, value, style

    def html(self, number: bool) -> str:
        names = " ".join(filter(None, ("number" if number else "", self.style)))
        sort = f' data-value="{self.value!r}"' if self.value is not None else ' data-value=""' if number else ""
        return f"<td{f' class={names!r}' if names else ''}{sort}>{escape(self.text)}</td>"


def _number(value: float | None, pattern: str = "{:,.1f}", style: str = "") -> Cell:
    return Cell("", None) if value is None else Cell(pattern.format(value), value, style)


def _lead(value: float | None) -> Cell:
    return _number(value, "{:.2f}x", "loss" if value is not None and value < 1 else "win")


def _table(name: str, columns: Mapping[str, bool], rows: Iterable[list[Cell]], label: str) -> str:
    """``columns``: title -> whether it holds numbers."""
    kinds = list(columns.values())
    head = "".join(
        f'<th scope="col"{" class=number" if number else ""}><button>{escape(title)}</button></th>'
        for title, number in columns.items()
    )
    body = "\n".join(
        f"<tr>{''.join(cell.html(number) for cell, number in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return (
        f'<p><input type="search" data-table="{name}" placeholder="only rows with these words" aria-label="filter"></p>'
        f'<div class="wide"><table id="{name}"><caption hidden>{escape(label)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


WHAT = {"op": False, "shape": False, "dtype": False, "pass": False, "cache": False}
CASES = WHAT | {
    "fastllm us": True, "best other": False, "its us": True, "over best": True, "over eager": True,
    "over torch.compile": True, "GB/s": True, "% copy": True, "TFLOP/s": True, "% matrix": True, "host us": True,
    "peak MB": True,
}  # fmt: skip
ROWS = WHAT | {
    "provider": False, "us": True, "lower quartile": True, "upper quartile": True, "samples": True, "host us": True,
    "peak MB": True, "first call s": True, "why not": False,
}  # fmt: skip


def _rates(row: Row, rates: Mapping[str, float]) -> list[Cell]:
    median = row.seconds.median
    bandwidth, flops = row.least_bytes / median, row.flops / median if row.flops else None
    return [
        _number(bandwidth / 1e9),
        _number(100 * bandwidth / rates["copy"], "{:.0f}"),
        _number(None if flops is None else flops / 1e12, "{:,.2f}"),
        _number(None if flops is None else 100 * flops / matrix_rate(rates, row.dtype), "{:.0f}"),
    ]


def _cost(row: Row) -> list[Cell]:
    host = Quartiles.of(row.host).median * 1e6 if row.host else None
    return [_number(host), _number(None if row.peak_bytes is None else row.peak_bytes / 1e6, "{:,.0f}")]


def _cases(run: Run) -> str:
    lines = []
    for case in in_cases(run.rows):
        ours, rival = case.ours, case.best_rival
        if ours is None:
            continue
        lines.append(
            [
                *map(Cell, ours.case), _number(ours.seconds.median * 1e6), Cell(rival.provider if rival else ""),
                _number(rival.seconds.median * 1e6 if rival else None),
                *(_lead(case.lead_over(other)) for other in (rival, case.of(EAGER), case.of(COMPILED))),
                *_rates(ours, run.environment["rates"]), *_cost(ours),
            ]
        )  # fmt: skip
    return _table("cases", CASES, lines, "fastllm beside the best other provider")


def _rows(run: Run) -> str:
    lines = []
    for case in in_cases(run.rows):
        timed = sorted((row for row in case.rows if row.samples), key=lambda row: row.seconds.median)
        for row in timed:
            q = row.seconds
            times = (_number(t * 1e6) for t in (q.median, q.low, q.high))
            first = _number(row.first_call, "{:,.3f}")
            samples = _number(len(row.samples), "{:.0f}")
            lines.append([*map(Cell, row.case), Cell(row.provider), *times, samples, *_cost(row), first, Cell("")])
        for row in case.rows:
            if not row.samples and not row.missing:
                lines.append([*map(Cell, row.case), Cell(row.provider), *[Cell("")] * 7, Cell(row.problem or "")])
    return _table("rows", ROWS, lines, "every provider")


def _environment(found: Mapping) -> str:
    shown = {name: value for name, value in found.items() if value is not None}
    rates = shown.pop("rates")
    shown["measured rates"] = f"{rates['copy'] / 1e9:,.1f} GB/s copy, {rates['matrix'] / 1e12:,.3f} TFLOP/s matrix"
    pairs = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd>"
        for name, value in shown.items()
    )
    return f"<dl>{pairs}</dl>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def page(run: Run, plots: Mapping[str, bytes]) -> str:
    """The page's HTML. ``plots``: name -> PNG, embedded."""
    cases = [case for case in in_cases(run.rows) if case.ours and case.best_rival]
    lost = sum(case.lead < 1 for case in cases)
    absent = sorted({f"{row.provider}: {row.problem}" for row in run.rows if row.missing})
    pictures = "".join(
        f'<p><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'
        for name, picture in plots.items()
    )
    parts = [
        f"<h1>fastllm bench: {escape(run.environment['device'])}</h1>",
        f"<p>{len(cases)} calls with a rival's time; in {lost} of them another provider is faster. Times are medians; "
        "providers took turns, and each was held to the op's error bound before it was timed. GB/s and TFLOP/s are "
        "least bytes and operations over the median.</p>",
        "<h2>Calls, losses first</h2>", _cases(run),
        "<h2>Plots</h2>", pictures,
        "<h2>Every provider</h2>", _rows(run),
        "<h2>Left out</h2>", _list([*run.left_out, *absent]) if run.left_out or absent else "<p>Nothing.</p>",
        "<h2>Where and what</h2>", _environment(run.environment),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastllm bench: {escape(run.environment['device'])}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def write_page(run: Run, plots: Mapping[str, bytes], file: Path) -> Path:
    """Writes :func:`page` to ``file`` and returns it."""
    file.write_text(page(run, plots), encoding="utf-8")
    return file
