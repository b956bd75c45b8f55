"""The parts of docs/tour.md and docs/tour-measured.md that are computed.

python docs/tour.py table                 the table of objectives and models, from tiny runs: rewrites docs/tour.md
python docs/tour.py curves RUNS           the pictures of docs/tour-measured.md, from the runs that RUNS holds
python docs/tour.py baseline PAIRS HELD   word by word, with a dictionary from PAIRS: BLEU and chrF on HELD
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TOUR = HERE / "tour.md"
# Picture -> what it shows of which runs: (run, label), and the scores of their metrics.jsonl. Runs whose names go on
# with -0, -1 and so forth differ in their seed.
CURVES = {
    "pretraining": ([("pretrain", "held out")], ["mlm_loss", "nsp_loss", "nsp_accuracy"]),
    "sections": ([("sections-pretrained", "pretrained"), ("sections-fresh", "fresh")], ["loss", "accuracy"]),
    "questions": ([("questions-pretrained", "pretrained"), ("questions-fresh", "fresh")], ["exact_match", "f1"]),
    "translation": (
        [("en-de", "Transformer, to German"), ("de-en", "Transformer, to English"), ("en-de-rnn", "LSTM, to German")],
        ["loss", "perplexity"],
    ),
    "language-models": (
        [("lm-transformer", "Transformer"), ("lm-lstm", "LSTM"), ("lm-gru", "GRU")], ["bits_per_byte", "perplexity"],
    ),
    "instructions": ([("docstrings-told", "answers")], ["perplexity"]),
    "preferences": ([("docstrings-preferring", "dpo")], ["preference_accuracy", "reward_accuracy", "margin"]),
    "distillation": ([("alone", "the student alone"), ("taught", "with the teacher")], ["bits_per_byte"]),
}  # fmt: skip
# (Picture, score) -> what chance gives, or the model before the run, by `fastllm eval`: a dashed line.
LEVELS = {
    ("pretraining", "nsp_accuracy"): 0.5,
    ("instructions", "perplexity"): 131.6,
    ("preferences", "preference_accuracy"): 0.139,
}
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

    from fastllm.training.reports.curves import new_figure, save_figure
    from fastllm.training.reports.progress import read_metrics

    made = []
    for name, (shown, scores) in CURVES.items():
        seeds = {run: sorted(runs.glob(f"{run}-[0-9]")) or [runs / run] for run, _ in shown}
        if not all((folder / "metrics.jsonl").exists() for folders in seeds.values() for folder in folders):
            continue
        figure, axes = new_figure(len(scores))
        clock = name == "language-models"
        scored = {
            folder: [line for line in read_metrics(folder / "metrics.jsonl") if "validation_loss" in line]
            for folders in seeds.values()
            for folder in folders
        }
        fewest = min(line["validation_tokens"] for lines in scored.values() for line in lines)
        rings = False
        for (run, label), colour in zip(shown, COLOURS, strict=False):
            for number, folder in enumerate(seeds[run]):
                lines = scored[folder]
                # During a run a part of what is held out is scored, at the end all of it.
                part = len(lines) - (lines[-1]["validation_tokens"] > fewest)
                rings |= part < len(lines)
                for one, score in zip(axes, scores, strict=True):
                    x = [line["seconds" if clock else "step"] for line in lines]
                    y = [line.get(f"validation_{score}", math.exp(line["validation_loss"])) for line in lines]
                    one.plot(
                        x[:part], y[:part], color=colour, marker="o", markersize=3, label=None if number else label
                    )
                    one.plot(x[part:], y[part:], "o", color=colour, markersize=7, markerfacecolor="none")
                    one.set_xlabel("seconds" if clock else "step")
                    one.set_ylabel(f"held-out {score.replace('_', ' ')}")
        for one, score in zip(axes, scores, strict=True):
            if (name, score) in LEVELS:
                one.axhline(LEVELS[name, score], color="#666666", linestyle="--", linewidth=0.8)
        axes[-1].legend(frameon=False, title="ring: on all held out" if rings else None)
        made.append(save_figure(figure, HERE / f"{name}.png"))
    return made


def dictionary(pairs: list[dict], rounds: int = 5) -> dict[str, str]:
    """For each source word its likeliest translation, by IBM's first model (Brown et al. 1993)."""
    import numpy as np

    ids: tuple[dict[str, int], dict[str, int]] = ({}, {})
    links, firsts = [], 0
    for pair in pairs:
        source, target = (
            np.array([known.setdefault(word, len(known)) for word in pair[side].split()], np.int64)
            for side, known in zip(("source", "target"), ids, strict=True)
        )
        # Each word of the target with each of the source; the last column tells one word of the target from the next.
        links.append(np.stack((np.tile(source, len(target)), np.repeat(target, len(source)),
                               firsts + np.repeat(np.arange(len(target)), len(source)))))  # fmt: skip
        firsts += len(target)
    source, target, word = np.concatenate(links, 1)
    cells, cell = np.unique(source * len(ids[1]) + target, return_inverse=True)
    row = cells // len(ids[1])
    probability = np.ones(len(cells))
    for _ in range(rounds):
        share = probability[cell]
        counts = np.bincount(cell, share / np.bincount(word, share)[word])
        probability = counts / np.bincount(row, counts)[row]
    names = [list(known) for known in ids]
    best = np.lexsort((-probability, row))
    best = best[np.r_[True, row[best][1:] != row[best][:-1]]]
    return {names[0][row[i]]: names[1][cells[i] % len(ids[1])] for i in best}


def baseline(pairs: Path, held: Path) -> dict[str, float]:
    """Scores of translating word by word; words that are not known stay as they are."""
    from fastllm.tasks.metrics import translation_scores
    from fastllm.tasks.read import read_pairs

    known, held_out = dictionary(read_pairs([pairs])), read_pairs([held])
    translations = [" ".join(known.get(w, w) for w in pair["source"].split()) for pair in held_out]
    return translation_scores([pair["target"] for pair in held_out], translations)


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
