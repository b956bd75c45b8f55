"""The bundled model's whole training step beside the same model in plain PyTorch.

    fastllm bench train [--preset small] [--batch-size 16] [--dtype bfloat16] [--steps 2] [--rounds 7] ...

Every provider starts from the same weights and takes the same batches. Before anything is timed, each takes CHECKED
steps and its losses must equal fastllm's; one that differs, or fails, is reported with the reason and without a time.
Then they take turns, --steps steps a turn. A step is forward, backward, clipping of the gradient's norm and AdamW, in
one precision for all (bfloat16 is autocast over fp32 weights) but for nanoGPT as it ships, which is fp32 on a CPU.
Batches come from host memory, as in training.

Speed-up: the quartiles, over the rounds, of the ratio of times within a round. MFU: tokens a second times
Transformer.flops_per_token over the matrix rate measured at the end. Peak memory: what torch's allocator held at
most during a provider's turns, on CUDA only.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import cpu
from ..matmul import matmul_flops
from ..models import PRESETS, Transformer, TransformerConfig
from ..parser import Parser, first_paragraph
from ..time_limit import OutOfTime, time_limit
from ..training.config import TrainingConfig
from ..training.objectives import Batch
from .environment import environment
from .left_running import none_left_running
from .rival import first_line
from .timing import Quartiles, interleaved, ratios, seconds, synchronize
from .train_steps import OURS, PROVIDERS, Setting, Step

CHECKED = 3
# Losses of the same weights and batches: rounding in bf16, 4 of its eps of the loss; in fp32, what AdamW's division by
# small second moments makes of eps-sized differences in three steps.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 4 * 2**-8}
# Share of the time that is left which a rival may take before it is timed, compilation included. A guess: turns are
# short beside a compilation.
RIVAL_SHARE = 0.75


@dataclass(frozen=True)
class Row:
    """One provider: why it was not timed, or its times. ``samples`` are seconds a step."""

    provider: str
    problem: str | None
    losses: list[float]
    samples: list[float]
    tokens_per_second: Quartiles | None = None
    speedup: Quartiles | None = None
    mfu: float | None = None
    peak_bytes: int | None = None


def batches(config: TransformerConfig, batch_size: int, count: int) -> list[Batch]:
    """Random ``tokens`` and, as ``targets``, the tokens after them, in host memory."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, batch_size, config.context_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    return [{"tokens": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()} for t in tokens]


class _Checked(NamedTuple):
    """Providers after their first steps: what takes a step, every provider's losses, why one is not timed."""

    steps: dict[str, Step]
    losses: dict[str, list[float]]
    problems: dict[str, str]


def _checked(
    setting: Setting, names: list[str], data: list[Batch], end: float, tell: Callable[[str], None]
) -> _Checked:
    """Sets the providers ``names`` up, ours first, and compares their losses on ``data`` with ours.

    ``end``: of the budget, by time.monotonic().
    """
    tolerance = LOSS_TOLERANCE[setting.dtype]
    found = _Checked({}, {}, {})
    for name in names:
        tell(f"{name}: {len(data)} steps, losses compared")
        limit = math.inf if name == OURS else RIVAL_SHARE * (end - time.monotonic())
        try:
            with none_left_running(), time_limit(limit):
                step = PROVIDERS[name](setting)
                losses = [float(step(batch)) for batch in data]
        except OutOfTime as error:
            found.problems[name] = str(error)
            continue
        except Exception as error:
            if name == OURS:
                raise
            found.problems[name] = first_line(error)
            continue
        found.losses[name] = losses
        ours = found.losses[OURS]
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, ours, strict=True))
        if not math.isfinite(sum(losses)) or worst > tolerance:
            found.problems[name] = f"losses {losses} differ from {ours} by {worst:.1e}, more than {tolerance:.1e}"
        else:
            found.steps[name] = step
    return found


def compare(
    setting: Setting,
    names: list[str],
    *,
    steps: int,
    rounds: int,
    budget: float = math.inf,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Sets the providers up, checks their losses, times those that agree in turns; ours comes first.

    Args:
        names: keys of :data:`PROVIDERS` beside ours.
        steps, rounds: steps a turn, and turns of each provider.
        budget: seconds for all of it. A rival that is not set up in its share of them is not timed, and no round begins
            after them but the first few.
        tell: takes progress lines.
    """
    end = time.monotonic() + budget
    # The optimiser of the others imports it. An import that a time limit stops leaves a module that cannot be used.
    importlib.import_module("torch._dynamo")
    config, device = setting.model.config, setting.device
    data = batches(config, setting.training.batch_size, max(CHECKED, steps))
    checked = _checked(setting, [OURS, *names], data[:CHECKED], end, tell)

    def turn(name: str) -> None:
        for batch in data[:steps]:
            checked.steps[name](batch)

    peaks: dict[str, int] = {}

    def timed(run, where):
        if where.type != "cuda":
            return seconds(run, where)
        synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        elapsed = seconds(run, where)
        peaks[run.args[0]] = max(peaks.get(run.args[0], 0), torch.cuda.max_memory_allocated(where))
        return elapsed

    tell(f"{rounds} rounds of {steps} steps each")
    turns = {n: functools.partial(turn, n) for n in checked.steps}
    samples = interleaved(turns, rounds, device, timer=timed, within=end - time.monotonic())
    rate = matmul_flops(device, getattr(torch, setting.dtype))
    tokens = setting.training.batch_size * config.context_length
    losses = checked.losses
    rows = [Row(name, problem, losses.get(name, []), []) for name, problem in checked.problems.items()]
    for name in checked.steps:
        per_step = [s / steps for s in samples[name]]
        speed = Quartiles.of([tokens / s for s in per_step])
        mfu = speed.median * setting.model.flops_per_token() / rate
        rows.append(Row(name, None, losses[name], per_step, speed, ratios(samples, OURS, name), mfu, peaks.get(name)))
    return sorted(rows, key=lambda row: [OURS, *names].index(row.provider))


def table(rows: list[Row], title: str):
    """The rows as a rich table."""
    from rich.table import Table

    columns = ("provider", "tok/s", "quartiles", "ms/step", "MFU", "peak GiB", "loss", "fastllm is")
    shown = Table(*columns, title=title)
    for row in rows:
        if row.problem:
            shown.add_row(row.provider, f"not timed: {row.problem}")
            continue
        q, ratio = row.tokens_per_second, row.speedup
        if q is None or ratio is None:
            raise ValueError(f"{row.provider}: neither a problem nor a time")
        shown.add_row(
            row.provider,
            f"{q.median:,.0f}",
            f"{q.low:,.0f} to {q.high:,.0f}",
            f"{Quartiles.of(row.samples).median * 1e3:,.1f}",
            f"{row.mfu:.0%}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
            f"{row.losses[-1]:.4f}",
            "" if row.provider == OURS else f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
        )
    return shown


def build_parser() -> Parser:
    """The parser of ``fastllm bench train``."""
    parser = Parser(prog="fastllm bench train", description=first_paragraph(__doc__))
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="the model (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences a step (default: %(default)s)"
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens a sequence (default: the preset's)")
    parser.add_argument(
        "--dtype", choices=list(LOSS_TOLERANCE), help="(default: bfloat16; float32 on a CPU without products of it)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all of it (default: no limit)")
    parser.add_argument("--compile", action="store_true", help="also plain PyTorch under torch.compile")
    parser.add_argument("--hugging-face", action="store_true", help="also transformers' GPT-2")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="also nanoGPT, from its checkout there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the environment there")
    return parser


def _read(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for name in ("batch_size", "context_length", "steps", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget: expected a number of seconds above 0, got {options.budget:g}")
    if options.nanogpt is not None and not (options.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: {options.nanogpt} has no model.py")
    return options


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    options = _read(argv)
    config = PRESETS[options.preset].replace(dropout=0.0)  # equal losses need equal masks, or none
    if options.context_length:
        config = config.replace(context_length=options.context_length)
    device = torch.device(options.device)
    options.dtype = options.dtype or cpu.precision(device)
    torch.manual_seed(0)
    setting = Setting(
        model=Transformer(config).to(device),
        training=TrainingConfig(batch_size=options.batch_size, optimizer="adamw", lr=3e-4),
        dtype=options.dtype,
        device=device,
        nanogpt=options.nanogpt,
    )
    names = ["PyTorch eager"]
    names += ["torch.compile"] if options.compile else []
    names += ["transformers"] if options.hugging_face else []
    names += ["nanoGPT"] if options.nanogpt else []
    budget = math.inf if options.budget is None else options.budget
    rows = compare(setting, names, steps=options.steps, rounds=options.rounds, budget=budget)
    found = environment(device)
    if options.json:
        content = {
            "environment": found,
            "model": asdict(config),
            "options": vars(options),
            "rows": [*map(asdict, rows)],
        }
        options.json.write_text(json.dumps(content, default=str, indent=1))
    title = (
        f"{options.preset}, batch {options.batch_size} x {config.context_length}, {options.dtype}, {found['device']}"
    )
    try:
        from .report import console
    except ModuleNotFoundError as error:
        print(f"no table: the package {error.name} is not installed")
    else:
        console().print(table(rows, title))


if __name__ == "__main__":
    main()
