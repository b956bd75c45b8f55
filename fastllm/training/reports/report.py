"""What a finished run leaves to look at: loss.png and samples.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import InputError
from ...data import Dataset, derive_seed
from ...files import write_text
from ...generate.sampling import generate
from ...models import LanguageModel, Model
from ...tasks.show import show
from ...tasks.store import TaskDataset
from ..evaluate import bits_per_byte
from .curves import BLUE, GREY, ORANGE, after_the_start, new_figure, plot_terms, save_figure, smoothed
from .progress import METRICS, read_metrics

# What samples.txt shows, and how it is drawn. Guesses.
SAMPLES, SAMPLE_TOKENS = 4, 200
TEMPERATURE, TOP_P = 0.8, 0.95
PROMPT_BYTES = 60


def plot_loss(run: Path, dataset: Any, title: str) -> Path:
    """Draw metrics.jsonl into ``run/loss.png``: training and validation in bits per byte, and xz's line.

    Where there are no bits per byte: each term of the loss, and each score beside it.
    """
    lines = read_metrics(run / METRICS)
    if not any("validation_bits_per_byte" in line for line in lines):
        return plot_terms(run, title)
    # A skipped step, or a score, that is not finite has null there.
    train = [line for line in lines if line.get("loss") is not None]
    held = [line for line in lines if line.get("validation_bits_per_byte") is not None]
    to_bits = bits_per_byte(1.0, dataset.train)
    bits, scores = [line["loss"] * to_bits for line in train], [line["validation_bits_per_byte"] for line in held]
    figure, (axes,) = new_figure(1, width=9, height=5.2, dpi=150)
    if train:
        steps = [line["step"] for line in train]
        axes.plot(steps, bits, color=BLUE, linewidth=0.6, alpha=0.25)
        axes.plot(steps, smoothed(bits), color=BLUE, linewidth=1.8, label="training (with dropout)")
    if held:
        steps = [line["step"] for line in held]
        axes.plot(steps, scores, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5, label="validation")
        axes.annotate(
            f"{scores[-1]:.3f}", (steps[-1], scores[-1]), xytext=(6, 0), textcoords="offset points", va="center",
            color=ORANGE, fontweight="bold",
        )  # fmt: skip
    xz = dataset.summary.xz_bits_per_byte
    if xz is not None:
        axes.axhline(xz, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), label=f"xz -9, training text seen: {xz:.3f}")
    shown = [*after_the_start(bits), *scores]
    if shown:
        low, high = min([*shown, *([xz] if xz is not None else [])]), max(shown)
        axes.set_ylim(low - 0.06 * (high - low) - 0.02, high + 0.03 * (high - low) + 0.02)
    axes.set_xlim(0, max([1, *(line["step"] for line in lines)]) * 1.06)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    if train and train[-1]["seconds"] > 0:
        _add_seconds(axes, train[-1]["seconds"] / train[-1]["step"])
    return save_figure(figure, run / "loss.png")


def _add_seconds(axes, rate: float) -> None:
    """A scale of seconds over the steps, ``rate`` each: the clock runs in step with them."""
    from matplotlib.ticker import FuncFormatter

    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda seconds: seconds / rate))
    top.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, labelcolor=GREY, labelsize=8)


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
