"""PNG plots of a run: the roofline, how many times as fast we are, and GB/s or TFLOP/s over a sweep."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .results import COMPILED, EAGER, OURS, Case, Row, Run, in_cases, matrix_rate

DIRECTIONS = ("forward", "backward", "both")
MARKERS = {"forward": "o", "backward": "s", "both": "^"}
# Okabe and Ito's colours, which the colour-blind tell apart; ours is the strongest.
OURS_COLOUR, OTHERS = "#d55e00", ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")


def _figure(width: float, height: float) -> Figure:
    # The Agg canvas directly: pyplot would look for a window system and keep global state.
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter("")


def floor(row: Row, rates: dict[str, float]) -> float:
    """Seconds that the device needs for the row's least bytes and its FLOPs."""
    return max(row.least_bytes / rates["copy"], row.flops / matrix_rate(rates, row.dtype))


def roofline(run: Run) -> bytes | None:
    """Our FLOP/s under the measured bandwidth and matrix rate; beside it every call's share of its own roof."""
    rates = run.environment["rates"]
    ours = [case.ours for case in in_cases(run.rows) if case.ours and case.ours.least_bytes]
    if not ours:
        return None
    figure = _figure(13, 5.2)
    left, right = figure.subplots(1, 2)
    colours = _colours(dict.fromkeys(row.op for row in ours), first=None)
    with_flops = [row for row in ours if row.flops]
    balance = rates["matrix"] / rates["copy"]
    intensities = [row.flops / row.least_bytes for row in with_flops]
    low, high = min([balance / 30, *intensities]), max([balance * 30, *intensities])
    roof = [low, balance, high]
    left.plot(roof, [min(x * rates["copy"], rates["matrix"]) / 1e12 for x in roof], color="#333333")
    for row, intensity in zip(with_flops, intensities, strict=True):
        left.plot(
            intensity, row.flops / row.seconds.median / 1e12, MARKERS[row.direction], color=colours[row.op], ms=5
        )  # fmt: skip
    left.set(
        xscale="log", yscale="log", xlabel="FLOPs a byte that must be moved", ylabel="TFLOP/s",
        title=f"Roofline: {rates['copy'] / 1e9:,.0f} GB/s copy, {rates['matrix'] / 1e12:,.3g} TFLOP/s matrix",
    )  # fmt: skip
    for row in ours:
        share = 100 * floor(row, rates) / row.seconds.median
        right.plot(floor(row, rates) * 1e6, share, MARKERS[row.direction], color=colours[row.op], ms=5)
    right.axhline(100, color="#333333", linewidth=0.8)
    right.set(xscale="log", ylim=(0, None), xlabel="least time (us)", ylabel="% of the roof", title="Share of the roof")
    _plain(right.xaxis)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    for name, colour in colours.items():
        right.plot([], [], "o", color=colour, label=name)
    for direction, marker in MARKERS.items():
        right.plot([], [], marker, color="#999999", label=direction)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _colours(names: Iterable[str], first: str | None = OURS) -> dict[str, str]:
    names = list(names)
    rest = [name for name in names if name != first]
    found = {name: OTHERS[i % len(OTHERS)] if first else f"C{i % 10}" for i, name in enumerate(rest)}
    return found | ({first: OURS_COLOUR} if first in names else {})


def geometric_mean(values: list[float]) -> float:
    """Of positive ``values``."""
    return math.exp(sum(map(math.log, values)) / len(values))


def leads(cases: list[Case]) -> dict[str, dict[str, list[float]]]:
    """Op -> against whom -> how many times as fast we are, in each of its calls."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        rivals = {EAGER: case.of(EAGER), COMPILED: case.of(COMPILED), "best other": case.best_rival}
        for name, rival in rivals.items():
            lead = case.lead_over(rival)
            if lead is not None:
                found.setdefault(case.rows[0].op, {}).setdefault(name, []).append(lead)
    return found


def speedups(run: Run) -> bytes | None:
    """Every call as a dot, and the geometric mean of each op; left of 1 we lose."""
    found = leads(in_cases(run.rows))
    if not found:
        return None
    ops = sorted(found, key=lambda op: geometric_mean(found[op].get("best other", [1.0])), reverse=True)
    figure = _figure(9, 1.2 + 0.55 * len(ops))
    axes = figure.subplots()
    kinds = {EAGER: "#0072b2", COMPILED: "#009e73", "best other": OURS_COLOUR}
    for y, op in enumerate(ops):
        for shift, (name, colour) in zip((0.25, 0, -0.25), kinds.items(), strict=True):
            values = found[op].get(name)
            if values:
                axes.plot(values, [y + shift] * len(values), "o", color=colour, alpha=0.3, ms=4)
                axes.plot(geometric_mean(values), y + shift, "|", color=colour, ms=11, mew=2.5)
    for name, colour in kinds.items():
        axes.plot([], [], "|", color=colour, ms=11, mew=2.5, label=f"over {name}")
    axes.axvline(1, color="#333333", linewidth=0.9)
    axes.set(xscale="log", yticks=range(len(ops)), yticklabels=ops, ylim=(-0.6, len(ops) - 0.4))
    axes.set(xlabel="times as fast (dots: calls; bars: means)")
    _plain(axes.xaxis)
    low, high = axes.get_xlim()
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high]
    axes.set_xticks(ticks)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    return _png(figure)


def over_size(rows: list[Row], rates: dict[str, float]) -> bytes:
    """GB/s, or TFLOP/s where the op has matrix products, of one op's sweep: a panel a direction, a line a provider."""
    by_flops = any(row.flops for row in rows)
    directions = [d for d in DIRECTIONS if any(row.direction == d for row in rows)]
    figure = _figure(4.4 * len(directions), 4.2)
    colours = _colours(dict.fromkeys(row.provider for row in rows))
    limit = matrix_rate(rates, rows[0].dtype) / 1e12 if by_flops else rates["copy"] / 1e9
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        for provider, colour in colours.items():
            same = [row for row in rows if (row.provider, row.direction) == (provider, direction)]
            same.sort(key=lambda row: row.size or 0)
            rate = [(r.flops / 1e12 if by_flops else r.least_bytes / 1e9) / r.seconds.median for r in same]
            width = 2 if provider == OURS else 1.2
            axes.plot([row.size for row in same], rate, "o-", color=colour, ms=3.5, linewidth=width, label=provider)
        axes.axhline(limit, color="#333333", linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, None), title=direction, xlabel=rows[0].axis)
        axes.set_xscale("log", base=2)
        _plain(axes.xaxis)
        axes.tick_params(axis="x", labelrotation=45)
        axes.grid(alpha=0.25)
    first = figure.axes[0]
    first.set_ylabel("TFLOP/s" if by_flops else "GB/s")
    first.legend(fontsize=7)
    figure.suptitle(f"{rows[0].op}, {rows[0].dtype}, {rows[0].cache} (dotted: measured limit)", fontsize=10)
    return _png(figure)


def plots(run: Run) -> dict[str, bytes]:
    """File stem -> PNG of every plot that the run's rows are enough for."""
    found = {"roofline": roofline(run), "speedup": speedups(run)}
    swept: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        if row.size is not None and row.samples:
            swept.setdefault((row.op, row.dtype, row.cache), []).append(row)
    for (op, dtype, cache), rows in swept.items():
        if len({row.size for row in rows}) > 1:
            found[f"{op}-{dtype}-{cache}"] = over_size(rows, run.environment["rates"])
    return {name: picture for name, picture in found.items() if picture is not None}
