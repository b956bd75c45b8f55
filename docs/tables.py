"""Rewrites what is generated of README.md and docs/benchmarks.md, and docs/speed.png: ``python docs/tables.py``.

``--check`` says whether something is stale.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from fastllm.bench.plots import geometric_mean, leads
from fastllm.bench.results import COMPILED, EAGER, Run, in_cases, read_run
from fastllm.bench.timing import ratios
from fastllm.registry import OPS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "speed.png"


def ops() -> str:
    """The op table, from the registry."""
    rows = ["| op | module | what it computes | backends |", "|---|---|---|---|"]
    for op in OPS.values():
        module = f"`nn.{op.module.__name__}`" if op.module else ""
        rows.append(f"| `functional.{op.name}` | {module} | {op.summary} | {', '.join(op.backends)} |")
    return "\n".join(rows)


def _measured(environment: dict) -> str:
    """On what, when and from which commit."""
    commit, _, changes = (environment["commit"] or "no commit").partition("+")
    return (
        f"{environment['device']}, {environment['date'][:10]}, commit {commit[:10]}{' and changes' if changes else ''}"
    )


def embedding_backward() -> str:
    """Ratios of bench/results/cpu/embedding-backward.json."""
    found = json.loads((RESULTS / "cpu" / "embedding-backward.json").read_text(encoding="utf-8"))
    dtypes = list(dict.fromkeys(row["dtype"] for row in found["rows"]))
    lines = [f"{_measured(found['environment'])}:", "", f"| | {' | '.join(dtypes)} |", "|---|" + "---|" * len(dtypes)]
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        ratios = {row["dtype"]: row["ratio"] for row in found["rows"] if row["case"] == case}
        cells = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in (ratios[d] for d in dtypes)]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def linear_cross_entropy() -> str:
    """bench/results/cpu/linear-cross-entropy-*.json: peaks beside the gradients, and time over PyTorch's chunks."""
    lines = []
    for file in sorted((RESULTS / "cpu").glob("linear-cross-entropy-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        ours, theirs = list(found["seconds"])
        speed = ratios(found["seconds"], ours, theirs)
        if not lines:
            names = list(found["peak_bytes"])
            lines = [f"{_measured(found['environment'])}:", "", f"| | {' | '.join(names)} | time over {theirs} |"]
            lines.append("|---|" + "---|" * (len(names) + 1))
        peaks = [f"{(found['peak_bytes'][name] - found['gradient_bytes']) / 1e6:,.0f} MB" for name in names]
        time = (
            f"{1 / speed.median:.2f} ({1 / speed.high:.2f} to {1 / speed.low:.2f}), {len(found['seconds'][ours])} pairs"
        )
        lines.append(f"| {found['call']['dtype']} | {' | '.join(peaks)} | {time} |")
    return "\n".join(lines)


# What stands beside fastllm in bench/results/*/train-small-*.json -> how the table says it.
BESIDE = {
    "PyTorch eager": "the same model in plain PyTorch",
    "torch.compile": "the same under torch.compile",
    "transformers": "transformers' GPT-2",
    "nanoGPT": "nanoGPT as it ships, in float32",
}


def training_step() -> str:
    """How many times as fast fastllm's training step is, of each machine in bench/results, the fewest instructions
    first."""
    folders = (RESULTS / name for name in ("cpu-avx2", "cpu-avx512", "cpu"))
    files = [file for folder in folders for file in sorted(folder.glob("train-small-*.json"))]
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    heads = [f"{run['environment']['device']}, {run['options']['dtype']}" for run in runs]
    lines = [f"| beside | {' | '.join(heads)} |", "|---|" + "---|" * len(runs)]
    for provider, words in BESIDE.items():
        rows = [next((row for row in run["rows"] if row["provider"] == provider), None) for run in runs]
        leads = ["" if row is None else row["speedup"] for row in rows]
        cells = [lead and f"{lead['median']:.2f} ({lead['low']:.2f} to {lead['high']:.2f})" for lead in leads]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _leads(run: Run) -> dict:
    """How far fastllm leads in each op's calls, forward and backward together: a loss may leave its gradient in the
    forward."""
    return leads(in_cases([row for row in run.rows if row.direction == "both"]))


def slower() -> str:
    """The ops of each bench.json that are slower than the best other way, an item for each run."""
    lines = []
    for file in sorted(RESULTS.glob("*/bench.json")):
        run = read_run(file)
        means = {op: geometric_mean(lead["best other"]) for op, lead in _leads(run).items() if lead.get("best other")}
        named = [f"`{op}` {mean:.2f}" for op, mean in sorted(means.items(), key=lambda item: item[1]) if mean < 0.995]
        lines.append(f"- {run.environment['device']}: {', '.join(named) or 'none'}")
    return "\n".join(lines)


def bench() -> str:
    """Each bench.json under bench/results: geometric means over an op's calls, both directions at once, worst first."""
    parts = []
    for file in sorted(RESULTS.glob("*/bench.json")):
        run = read_run(file)
        found = _leads(run)
        lines = [f"{_measured(run.environment)}; every sample is in `{file.relative_to(ROOT)}`:", ""]
        kinds = (EAGER, COMPILED, "best other")
        lines += [f"| op | calls | {' | '.join(f'over {kind}' for kind in kinds)} |", "|---|---|---|---|---|"]

        def mean(op: str, kind: str, found=found) -> float | None:
            values = found[op].get(kind)
            return geometric_mean(values) if values else None

        for op in sorted(found, key=lambda op: mean(op, "best other") or 0.0):
            cells = ["" if (m := mean(op, kind)) is None else f"{m:.2f}" for kind in kinds]
            lines.append(f"| {op} | {max(map(len, found[op].values()))} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No run is in bench/results yet."


def fields() -> str:
    """A table for each object of docs/bench.schema.json."""
    schema = json.loads((ROOT / "docs" / "bench.schema.json").read_text(encoding="utf-8"))
    parts = []

    def described(field: dict) -> dict:
        return field if "$ref" not in field else schema["$defs"][field["$ref"].rpartition("/")[2]]

    def table(title: str, part: dict) -> None:
        lines = [f"### {title}", "", "| field | type | what it is |", "|---|---|---|"]
        inner = []
        for name, field in part["properties"].items():
            found = described(field)
            kind = found.get("type", "string")
            kinds = " or ".join([kind] if isinstance(kind, str) else kind)
            lines.append(f"| `{name}` | {kinds} | {found.get('description', 'See below.')} |")
            item = described(found["items"]) if "items" in found else found
            if isinstance(found.get("additionalProperties"), dict) and "$ref" in found["additionalProperties"]:
                item = described(found["additionalProperties"])
            if "properties" in item:
                inner.append((f"{title}, {name}", item))
        parts.append("\n".join(lines))
        for found in inner:
            table(*found)

    table("bench.json", schema)
    return "\n\n".join(parts)


GENERATED = {
    "docs/bench-json.md": {"fields": fields},
    "README.md": {"ops": ops, "training-step": training_step, "slower": slower},
    "docs/benchmarks.md": {
        "bench": bench,
        "training-step": training_step,
        "embedding-backward": embedding_backward,
        "linear-cross-entropy": linear_cross_entropy,
    },
}


def regenerate(page: str, text: str) -> str:
    """``text`` of a page with each ``<!-- NAME: generated -->`` ... ``<!-- end -->`` filled anew."""
    for name, make in GENERATED[page].items():
        pattern = re.compile(rf"(<!-- {name}: generated[^\n]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, make=make: match[1] + make() + match[2], text)
        if found != 1:
            raise SystemExit(f"{page}: expected one generated part named {name!r}, found {found}")
    return text


def picture_sources() -> str:
    """Changes with every measurement that the picture shows. The picture carries it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(RESULTS.glob("*/bench.json")))).hexdigest()


def draw_picture() -> None:
    """Geometric means of forward and backward together, a panel for each bench.json."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    runs = [read_run(file) for file in sorted(RESULTS.glob("*/bench.json"))]
    found = [leads(in_cases([row for row in run.rows if row.direction == "both"])) for run in runs]
    figure = Figure(figsize=(4.6 * max(len(runs), 2), 0.6 + 0.42 * max(map(len, found))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, run, leads_of in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, found, strict=True):
        order = sorted(leads_of, key=lambda op: geometric_mean(leads_of[op].get(EAGER, [1.0])))
        for shift, kind, colour in ((0.2, EAGER, "#0072b2"), (-0.2, COMPILED, "#009e73")):
            means = {y: geometric_mean(leads_of[op][kind]) for y, op in enumerate(order) if leads_of[op].get(kind)}
            places, lengths = [y + shift for y in means], [mean - 1 for mean in means.values()]
            axes.barh(places, lengths, 0.36, left=1, color=colour, label=f"over {kind}")
            for y, mean in means.items():
                side = 1 if mean >= 1 else -1
                axes.annotate(
                    f"{mean:.1f}" if mean >= 10 else f"{mean:.2f}", (mean, y + shift), xytext=(3 * side, 0),
                    textcoords="offset points", fontsize=7, va="center", ha="left" if side > 0 else "right",
                )  # fmt: skip
        axes.axvline(1, color="#333333", linewidth=0.9)
        axes.set(xscale="log", xlim=(0.4, 32), yticks=range(len(order)), yticklabels=order)
        axes.set_xticks([0.5, 1, 2, 5, 10, 20])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("times as fast")
        axes.set_title(_measured(run.environment).replace(", commit", "\ncommit"), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(PICTURE, metadata={"Sources": picture_sources()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether something is stale; write nothing")
    check = parser.parse_args().check
    for page in GENERATED:
        file = ROOT / page
        old = file.read_text(encoding="utf-8")
        new = regenerate(page, old)
        if check and new != old:
            sys.exit(f"{page} is stale: run python docs/tables.py")
        if new != old:
            file.write_text(new, encoding="utf-8")
    fresh = PICTURE.exists() and picture_sources().encode() in PICTURE.read_bytes()
    if check and not fresh:
        sys.exit(f"{PICTURE.relative_to(ROOT)} is stale: run python docs/tables.py")
    if not fresh:
        draw_picture()


if __name__ == "__main__":
    main()
