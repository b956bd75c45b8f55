"""One HTML page about one or several runs: curves side by side, meters, samples, and what differs in their settings.

The page is one file: pictures are inline SVG, there is no script and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import InputError
from ...files import write_text
from ..config import read_run_config
from .curves import after_the_start, smoothed
from .progress import METRICS, PHASES, read_metrics

COLOURS = ("#2a78b5", "#d9662b", "#3a9d5d", "#8a5fb0", "#b5862a", "#c2487a", "#4d4d4d", "#2aa5a5")
# The next style is taken when the colours run out: matplotlib's name, and the legend's in CSS.
DASHES = (("solid", "solid"), ("dashed", "dashed"), ("dotted", "dotted"))
# These are smoothed, since the value of a single step says little.
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")
# Quantities that have a picture where a run has them: key, title, whether the axis is logarithmic.
CURVES = (
    ("loss", "training loss (nats per token, smoothed)", False),
    ("validation_loss", "validation loss (nats per token)", False),
    ("validation_bits_per_byte", "validation (bits per byte)", False),
    ("grad_norm", "gradient norm before clipping (smoothed)", True),
    ("lr", "learning rate of AdamW", False),
    ("tokens_per_second", "tokens per second (smoothed)", False),
    ("mfu", "model FLOPs utilisation", False),
    ("skipped", "skipped steps so far", False),
    ("rank_skew_seconds", "slowest rank minus fastest, seconds", False),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1rem }
.curves svg { width: 100%; height: auto } .runs { display: flex; gap: 1.5rem; flex-wrap: wrap }
.samples { flex: 1 1 min(400px, 100%); min-width: 0 } pre { white-space: pre-wrap; background: #f6f6f6; padding: .8rem;
max-height: 24rem; overflow: auto; overflow-wrap: anywhere } .key { display: inline-block; width: 1.8em; height: 0;
vertical-align: middle; margin-right: .4em; border-top: .2em solid } .wide { overflow-x: auto }
td:first-child, .results td, .results th { white-space: nowrap }
@media (max-width: 700px) { body { margin: 1rem auto } .runs { gap: .3rem 1rem }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem } } tr.differs td { background: #fff6e5 }
"""


def _curve(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [
        (line["step"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key]) and isinstance(line.get("step"), int)
    ]
    steps, values = [step for step, _ in points], [float(value) for _, value in points]
    return steps, smoothed(values) if key in SMOOTHED else values


def _picture(title: str, curves: list[tuple[tuple[str, str], list[float], list[float]]], logarithmic: bool) -> str:
    """An SVG of one quantity over the steps, a line for each run."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for (colour, dash), steps, values in curves:
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=dash,
            linewidth=1.4,
            marker="o" if len(steps) < 30 else None,
            markersize=3,
        )
    if logarithmic and all(value > 0 for _, _, values in curves for value in values):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1 instead of 10^-1
        # Within a decade the ticks between powers of ten are the only ones.
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    shown = sorted(value for _, _, values in curves for value in after_the_start(values))
    if not logarithmic and len(shown) > 20 and shown[-1] > shown[0]:
        # A few outliers must not flatten the rest.
        high = shown[int(0.995 * (len(shown) - 1))]
        axes.set_ylim(top=min(shown[-1], high + 0.3 * (high - shown[0])) + 0.03 * (high - shown[0]) + 1e-12)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)


def _table(header: list[str], rows: list[list[str]], marked: Collection[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{"differs" if number in marked else "same"}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _result(lines: list[dict[str, Any]]) -> list[str]:
    steps = [line for line in lines if "lr" in line]
    scores = [line for line in lines if "validation_loss" in line]
    last = steps[-1] if steps else {}
    spent = [sum(line.get(f"{phase}_seconds") or 0.0 for line in steps) for phase in PHASES]
    total = sum(spent)

    def shown(value: object, form: str) -> str:
        return format(value, form) if isinstance(value, int | float) else "-"

    # JSON has no NaN: a loss that was not finite is written as null.
    loss = "not finite" if "loss" in last and last["loss"] is None else shown(last.get("loss"), ".4f")
    return [
        shown(last.get("step"), ","), shown(last.get("tokens"), ","), shown(last.get("seconds"), ",.1f"), loss,
        shown(scores[-1]["validation_loss"] if scores else None, ".4f"),
        shown(scores[-1].get("validation_bits_per_byte") if scores else None, ".4f"),
        shown(last.get("tokens_per_second"), ",.0f"), shown(last.get("mfu"), ".1%"), shown(last.get("skipped"), ","),
        " / ".join(f"{part / total:.0%}" for part in spent) if total else "-",
    ]  # fmt: skip


def make_page(runs: list[Path], out: Path) -> None:
    """Write the page about ``runs`` (folders) to ``out``.

    One that ended before its first step has a row without numbers.

    Raises:
        InputError: one is not a run, or none has metrics yet. The message names it.
        OSError: ``out`` cannot be written.
    """
    settings = [_settings(run) for run in runs]
    metrics = [[line for line in read_metrics(run / METRICS) if isinstance(line, dict)] for run in runs]
    if not any(metrics):
        raise InputError(f"{runs[0]}: metrics.jsonl has nothing to show yet")
    names = _names(runs)
    looks = [(COLOURS[n % len(COLOURS)], *DASHES[n // len(COLOURS) % len(DASHES)]) for n in range(len(runs))]
    legend = "".join(
        f'<div><span class="key" style="border-color:{colour};border-top-style:{css}"></span>{html.escape(name)}</div>'
        for name, (colour, _, css) in zip(names, looks, strict=True)
    )
    header = [
        "run", "steps", "tokens", "seconds", "loss", "validation loss", "bits per byte", "tokens/s", "MFU", "skipped",
        " / ".join(PHASES),
    ]  # fmt: skip
    results = _table(header, [[name, *_result(lines)] for name, lines in zip(names, metrics, strict=True)])
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [[key, *(str(each.get(key, "-")) for each in settings)] for key in keys]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)  # those that differ come first, in their order
    differing = sum(len(set(row[1:])) > 1 for row in rows)
    samples = "".join(
        f'<div class="samples"><h3>{html.escape(name)}</h3><pre>{html.escape(_samples(run))}</pre></div>'
        for name, run in zip(names, runs, strict=True)
    )
    write_text(
        out,
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(", ".join(names))}</title>'
        f'<style>{_STYLE}</style><h1>Training runs</h1><div class="runs">{legend}</div><h2>Results</h2>'
        f'<div class="results">{results}</div>'
        f'<h2>Curves</h2><div class="curves">{"".join(_pictures(looks, metrics))}</div>'
        f'<h2>Samples</h2><div class="runs">{samples}</div>'
        f"<h2>Settings{'; those that differ come first' if differing else ''}</h2>"
        f"{_table(['setting', *names], rows, set(range(differing)))}</html>\n",
    )


def _settings(run: Path) -> dict[str, object]:
    """The run's settings, each under its table's name and its own."""
    if not (run / "config.toml").is_file():
        raise InputError(f"{run}: no run: config.toml is missing")
    tables = asdict(read_run_config(run / "config.toml"))
    return {f"{table}.{key}": value for table, part in tables.items() for key, value in part.items()}


def _pictures(looks: list[tuple], metrics: list[list[dict]]) -> Iterator[str]:
    """A picture of each curve that a run has; of skipped steps only where there were some."""
    for key, title, logarithmic in CURVES:
        curves = [(look[:2], *_curve(lines, key)) for look, lines in zip(looks, metrics, strict=True)]
        curves = [curve for curve in curves if curve[1]]
        if curves and not (key == "skipped" and not any(max(values) for _, _, values in curves)):
            yield _picture(title, curves, logarithmic)


def _names(runs: list[Path]) -> list[str]:
    """What the runs are called: their paths, without the folders that all of them are in."""
    parts = [run.parts for run in runs]
    common = 0
    while len({part[: common + 1] for part in parts}) == 1 and common + 1 < min(map(len, parts)):
        common += 1
    return [str(Path(*part[common:])) for part in parts]


def _samples(run: Path) -> str:
    try:
        return (run / "samples.txt").read_text("utf-8", errors="replace")
    except OSError:
        return "none yet: a run writes them at its end"
