"""Rewrites the generated parts of the README: ``python docs/tables.py``; ``--check`` says whether they are stale."""

import json
import re
import sys
from pathlib import Path

from fastllm.bench.plots import geometric_mean, leads
from fastllm.bench.results import COMPILED, EAGER, in_cases, read_run
from fastllm.bench.timing import ratios
from fastllm.registry import OPS

README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "bench" / "results"


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


def bench() -> str:
    """Each bench.json under bench/results: geometric means over an op's calls, both directions at once, worst first."""
    parts = []
    for file in sorted(RESULTS.glob("*/bench.json")):
        run = read_run(file)
        # Forward and backward together: a loss may leave its gradient behind in the forward.
        found = leads(in_cases([row for row in run.rows if row.direction == "both"]))
        lines = [f"{_measured(run.environment)}; [every sample]({file.relative_to(README.parent)}):", ""]
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


GENERATED = {
    "ops": ops,
    "bench": bench,
    "embedding-backward": embedding_backward,
    "linear-cross-entropy": linear_cross_entropy,
}


def regenerate(text: str) -> str:
    """``text`` with each ``<!-- NAME: generated -->`` ... ``<!-- end -->`` filled anew."""
    for name, make in GENERATED.items():
        pattern = re.compile(rf"(<!-- {name}: generated[^\n]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, make=make: match[1] + make() + match[2], text)
        if found != 1:
            raise SystemExit(f"{README}: expected one generated part named {name!r}, found {found}")
    return text


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = regenerate(old)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == old else f"{README} is stale: run python docs/tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
