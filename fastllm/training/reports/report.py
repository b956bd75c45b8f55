"""What a finished run leaves to look at: loss.png and samples.txt."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ...config import InputError
from ...data import Dataset, derive_seed
from ...files import whole_file, write_text
from ...generate.sampling import generate
from ...models import LanguageModel, Model
from ...tasks.show import show
from ...tasks.store import TaskDataset
from ..evaluate import bits_per_byte
from .curves import smooth
from .progress import read_metrics

SAMPLES, SAMPLE_TOKENS = 4, 200
TEMPERATURE, TOP_P = 0.8, 0.95
PROMPT_BYTES = 60


def plot_loss(run: Path, dataset: Any, title: str) -> Path:
    """Draw metrics.jsonl into ``run/loss.png``: training and validation in bits per byte, and xz's line.

    Where there are no bits per byte: each term of the loss, and each score beside it.
    """
    if not any("validation_bits_per_byte" in line for line in read_metrics(run / "metrics.jsonl")):
        from .curves import plot_terms

        return plot_terms(run, title)
    # The Agg canvas directly: pyplot would look for a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lines = read_metrics(run / "metrics.jsonl")
    # A skipped step, or a score, that is not finite has null there.
    train = [line for line in lines if line.get("loss") is not None]
    validation = [line for line in lines if line.get("validation_bits_per_byte") is not None]
    to_bits = bits_per_byte(1.0, dataset.train)
    blue, orange, grey = "#2a78b5", "#d9662b", "#666666"

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps = [line["step"] for line in train]
        bits = [line["loss"] * to_bits for line in train]
        axes.plot(steps, bits, color=blue, linewidth=0.6, alpha=0.25)
        axes.plot(steps, smooth(bits, len(bits) // 50), color=blue, linewidth=1.8, label="training (with dropout)")
    if validation:
        final = validation[-1]
        x, y = [line["step"] for line in validation], [line["validation_bits_per_byte"] for line in validation]
        axes.plot(x, y, color=orange, linewidth=1.8, marker="o", markersize=3.5, label="validation")
        axes.annotate(
            f"{final['validation_bits_per_byte']:.3f}", (x[-1], y[-1]), xytext=(6, 0),
            textcoords="offset points", va="center", color=orange, fontweight="bold",
        )  # fmt: skip
    xz = dataset.summary.xz_bits_per_byte
    if xz is not None:
        axes.axhline(xz, color=grey, linewidth=1.2, linestyle=(0, (5, 3)), label=f"xz -9, training text seen: {xz:.3f}")
    # The first steps are far above the rest and would flatten it.
    shown = [line["loss"] * to_bits for line in train[len(train) // 50 :]] + [
        line["validation_bits_per_byte"] for line in validation
    ]
    if shown:
        low, high = min([*shown, *([xz] if xz is not None else [])]), max(shown)
        axes.set_ylim(low - 0.06 * (high - low) - 0.02, high + 0.03 * (high - low) + 0.02)
    axes.set_xlim(0, max([1, *(line["step"] for line in lines)]) * 1.06)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if train and train[-1]["seconds"] > 0:
        # The clock runs in step with the steps: one more scale over the same axis.
        rate = train[-1]["seconds"] / train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda seconds: seconds / rate))
        top.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
        top.spines["top"].set_visible(False)
        top.tick_params(length=0, labelcolor=grey, labelsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with whole_file(run / "loss.png") as file:
        file.write(image.getvalue())
    return run / "loss.png"


def write_samples(run: Path, model: Model, dataset: Dataset | TaskDataset, seed: int) -> str:
    """Write ``run/samples.txt``: from nothing, and from the first words of held-out documents; or held-out examples."""
    if isinstance(dataset, TaskDataset) or not isinstance(model, LanguageModel):
        text = show(model, dataset, SAMPLES)
        write_text(run / "samples.txt", text)
        return text
    tokenizer = dataset.tokenizer
    ids = dataset.validation.tokens
    starts = [i + 1 for i in range(len(ids) - 1) if ids[i] == tokenizer.end_of_text]
    prompts = [""]
    for start in starts[: SAMPLES - 1]:
        text = tokenizer.decode(int(i) for i in ids[start : start + PROMPT_BYTES])
        prompts.append(text[:PROMPT_BYTES].rpartition(" ")[0].rstrip() or text[:PROMPT_BYTES])
    blocks = []
    for number, prompt in enumerate(prompts):
        tokens = generate(
            model,
            [tokenizer.end_of_text, *tokenizer.encode(prompt)],
            max_new_tokens=SAMPLE_TOKENS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=derive_seed(seed, "samples", number) % 2**31,
            stop_token=tokenizer.end_of_text,
        )
        try:
            continuation = tokenizer.decode(tokens)
        except InputError as error:
            continuation = f" ({error})"
        heading = f"prompt: {prompt!r}" if prompt else "no prompt"
        blocks.append(f"--- {heading}\n{prompt}{continuation}\n")
    text = f"temperature {TEMPERATURE}, top-p {TOP_P}, {SAMPLE_TOKENS} tokens at most\n\n" + "\n".join(blocks)
    write_text(run / "samples.txt", text)
    return text
