"""The parts of docs/tour.md that are computed.

python docs/tour.py table                 the table of objectives and models, from tiny runs: rewrites docs/tour.md
python docs/tour.py curves RUNS           the pictures, from the runs that the tour's commands left in RUNS
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TOUR = HERE / "tour.md"
# Picture -> what it shows of which runs: (run, label), and the scores of their metrics.jsonl.
CURVES = {
    "pretraining": ([("pretrain", "masked words + next sentence")], ["mlm_loss", "nsp_loss", "nsp_accuracy"]),
    "sections": ([("sections-pretrained", "pretrained"), ("sections-fresh", "fresh")], ["loss", "accuracy"]),
    "questions": ([("questions-pretrained", "pretrained"), ("questions-fresh", "fresh")], ["exact_match", "f1"]),
    "translation": ([("translate-transformer", "Transformer"), ("translate-rnn", "GRU")], ["loss", "perplexity"]),
    "language-models": (
        [("lm-transformer", "Transformer"), ("lm-lstm", "LSTM"), ("lm-gru", "GRU")], ["bits_per_byte", "perplexity"],
    ),
}  # fmt: skip
COLOURS = ("#2a78b5", "#d9662b", "#3b8f4f")


def table() -> str:
    """Markdown: for every objective and model that serve each other, the loss of a batch before and after its steps."""
    import torch

    sys.path.insert(0, str(HERE.parent / "tests"))
    import cells

    torch.set_num_threads(1)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    names = list(dict.fromkeys(name for name, *_ in cells.cells()))
    with tempfile.TemporaryDirectory() as folder:
        for name, encoder, decoder in cells.cells():
            first, last = cells.tiny_run(name, encoder, decoder, Path(folder))
            rows.setdefault((encoder, decoder), {})[name] = f"{first:.2f} -> {last:.2f}"
    lines = [f"| encoder | decoder | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for (encoder, decoder), row in rows.items():
        lines.append(f"| {encoder} | {decoder} | {' | '.join(row.get(name, '') for name in names)} |")
    return "\n".join(lines)


def curves(runs: Path) -> list[Path]:
    """Draw every picture whose runs are all there."""
    import math

    from fastllm.training.curves import new_figure, save_figure
    from fastllm.training.progress import read_metrics

    made = []
    for name, (shown, scores) in CURVES.items():
        if not all((runs / run / "metrics.jsonl").exists() for run, _ in shown):
            continue
        figure, axes = new_figure(len(scores))
        clock = name == "language-models"
        for (run, label), colour in zip(shown, COLOURS, strict=False):
            lines = [line for line in read_metrics(runs / run / "metrics.jsonl") if "validation_loss" in line]
            for one, score in zip(axes, scores, strict=True):
                key = f"validation_{score}"
                x = [line["seconds" if clock else "step"] for line in lines]
                y = [line.get(key, math.exp(line["validation_loss"])) for line in lines]
                one.plot(x, y, color=colour, marker="o", markersize=3, label=label)
                one.set_xlabel("seconds" if clock else "step")
                one.set_ylabel(f"held-out {score.replace('_', ' ')}")
        axes[-1].legend(frameon=False)
        made.append(save_figure(figure, HERE / f"{name}.png"))
    return made


def main() -> None:
    if sys.argv[1:] == ["table"]:
        old = TOUR.read_text("utf-8")
        pattern = re.compile(r"(<!-- table -->\n).*?(\n<!-- end -->)", re.DOTALL)
        TOUR.write_text(pattern.sub(lambda match: match[1] + table() + match[2], old), "utf-8")
    elif len(sys.argv) == 3 and sys.argv[1] == "curves":
        for path in curves(Path(sys.argv[2])):
            print(path)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
