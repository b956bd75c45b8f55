"""The parts of docs/tour.md that are computed.

python docs/tour.py table                 the table of objectives and models, from tiny runs: rewrites docs/tour.md
python docs/tour.py curves RUNS           the pictures, from the runs that RUNS holds
python docs/tour.py baseline PAIRS HELD   word by word: BLEU and chrF on the pairs that a run on PAIRS holds out,
                                          which are written to HELD for fastllm eval
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
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


def dictionary(pairs: list[dict], rounds: int = 4) -> dict[str, str]:
    """For each source word its likeliest translation, by IBM's first model (Brown et al. 1993)."""
    words = [(pair["source"].split(), pair["target"].split()) for pair in pairs]
    table: dict[str, dict[str, float]] = {}
    for number in range(rounds):
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for source, target in words:
            for word in target:
                shares = [table[s].get(word, 0.0) if number else 1.0 for s in source]
                total = sum(shares)
                for s, share in zip(source, shares, strict=True):
                    counts[s][word] += share / total
        table = {s: {w: c / sum(row.values()) for w, c in row.items()} for s, row in counts.items()}
    return {s: max(row, key=row.get) for s, row in table.items()}


def baseline(pairs: Path, held: Path) -> dict[str, float]:
    """Scores of translating word by word; words that are not known stay as they are."""
    from fastllm.tasks.metrics import translation_scores
    from fastllm.tasks.read import read_pairs
    from fastllm.tasks.store import split

    train, validation = split(read_pairs([pairs]))
    held.write_text("".join(f"{pair['source']}\t{pair['target']}\n" for pair in validation), "utf-8")
    known = dictionary(train)
    translations = [" ".join(known.get(w, w) for w in pair["source"].split()) for pair in validation]
    return translation_scores([pair["target"] for pair in validation], translations)


def main() -> None:
    if sys.argv[1:] == ["table"]:
        old = TOUR.read_text("utf-8")
        pattern = re.compile(r"(<!-- table -->\n).*?(\n<!-- end -->)", re.DOTALL)
        TOUR.write_text(pattern.sub(lambda match: match[1] + table() + match[2], old), "utf-8")
    elif len(sys.argv) == 3 and sys.argv[1] == "curves":
        for path in curves(Path(sys.argv[2])):
            print(path)
    elif len(sys.argv) == 4 and sys.argv[1] == "baseline":
        print(baseline(*map(Path, sys.argv[2:])))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
