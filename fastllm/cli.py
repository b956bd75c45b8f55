"""The command line: ``fastllm train``, ``fastllm generate``, ``fastllm info``.

Exit codes: 0 done; 1 a run failed (disk full, loss not finite); 2 the input was refused before any work; 130 and 143
stopped by SIGINT and SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import InputError, add_flags, flags_given, read_toml, settings
from .version import __version__

RUNS = Path("runs")


class _Parser(argparse.ArgumentParser):
    """argparse's, with errors on one line and no abbreviated flags."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    # Imported here: `fastllm --version` need not wait for torch.
    from .data import DataConfig
    from .models import PRESETS, TransformerConfig
    from .training.config import DEFAULT_PRESET, TrainingConfig

    parser = _Parser(prog="fastllm", description="Train and use a language model built on fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train", help="train a model on text, from scratch or from where a run stopped",
        description="Train a model on text. Without arguments: a tiny one on the language reference that Python "
        "carries, in under two minutes.",
    )  # fmt: skip
    run = train.add_argument_group("run")
    run.add_argument("--out", metavar="FOLDER", help="the run's folder (default: the next free runs/NNNN)")
    run.add_argument("--resume", metavar="RUN", help="go on with this run, or from one of its checkpoints")
    run.add_argument("--config", metavar="FILE.toml", help="settings, as in a run's config.toml; flags override it")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.add_argument("--preset", choices=list(PRESETS), help=f"the model's shape (default: {DEFAULT_PRESET})")
    add_flags(train, DataConfig, "data")
    add_flags(train, TransformerConfig, "model (override the preset)", PRESETS[DEFAULT_PRESET])
    add_flags(train, TrainingConfig, "training")

    generate = commands.add_parser("generate", help="continue a text", description="Continue a text with a model.")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="FOLDER", help="a run's folder (default: the newest in runs)")
    source.add_argument("--model", metavar="FOLDER", help="config.json, model.safetensors and tokenizer.json")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="the text to continue (default: none)")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X",
        help="divides the logits; 0 takes the likeliest token (default: %(default)s)",
    )  # fmt: skip
    generate.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens only")
    generate.add_argument("--top-p", type=float, metavar="X", help="sample within the nucleus of this probability only")
    generate.add_argument("--seed", type=int, metavar="N", help="makes the draw repeatable")
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")

    commands.add_parser("info", help="versions, hardware, and which backend serves each op here and why")
    return parser


def _next_run(runs: Path) -> Path:
    numbers = [int(path.name) for path in runs.glob("[0-9]*") if path.name.isdigit()]
    return runs / f"{max(numbers, default=0) + 1:04d}"


def _train(arguments: argparse.Namespace) -> int:
    from .data import DataConfig
    from .models import TransformerConfig
    from .training import TrainingConfig, build_run_config, resume, train

    model = flags_given(arguments, TransformerConfig)
    tables = {"data": flags_given(arguments, DataConfig), "training": flags_given(arguments, TrainingConfig)}
    if arguments.resume is not None:
        free = {setting.name for setting in settings(TrainingConfig) if setting.metadata.get("resume")}
        fixed = [*tables["data"], *model, *(name for name in tables["training"] if name not in free)]
        fixed += [name for name in ("out", "config", "preset") if getattr(arguments, name) is not None]
        if fixed:
            raise InputError(f"--resume: a run keeps its settings; --{fixed[0].replace('_', '-')} cannot be given")
        result = resume(arguments.resume, tables["training"], quiet=arguments.quiet)
    else:
        file = read_toml(arguments.config) if arguments.config else {}
        where = arguments.config or "fastllm train"
        # Check the file by itself first, so that a message names the file only for what it says.
        build_run_config(file, where)
        merged = {title: {**file.get(title, {}), **table} for title, table in tables.items()}
        # A preset on the command line replaces the file's whole model.
        merged["model"] = {**({} if arguments.preset else file.get("model", {})), **model}
        config = build_run_config(merged, "fastllm train", arguments.preset)
        result = train(config, arguments.out or _next_run(RUNS), quiet=arguments.quiet)
    return 128 + result.signal if result.signal else 0


def _model_folder(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The folder with the weights, and the tokenizer's file."""
    from .training.checkpoint import find_checkpoint

    if arguments.model is not None:
        folder = Path(arguments.model)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        return folder, folder / "tokenizer.json"
    if arguments.run is not None:
        run = Path(arguments.run)
    else:
        runs = sorted((path for path in RUNS.glob("*") if (path / "config.toml").exists()), key=os.path.getmtime)
        if not runs:
            raise InputError("no run in runs; train one with fastllm train, or name a --run or --model")
        run = runs[-1]
    if (run / "model").is_dir():
        return run / "model", run / "model" / "tokenizer.json"
    return find_checkpoint(run), run / "data" / "tokenizer.json"


def _generate(arguments: argparse.Namespace) -> int:
    from .data import Tokenizer
    from .generate import check_sampling, generate
    from .models import Transformer
    from .training.loop import pick_device

    sampling = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    try:
        check_sampling(**sampling)
    except ValueError as error:
        raise InputError(str(error)) from error
    device = pick_device(arguments.device)
    folder, tokenizer_file = _model_folder(arguments)
    tokenizer = Tokenizer.load(tokenizer_file)
    try:
        model = Transformer.from_pretrained(folder).to(device)
    except ValueError as error:
        raise InputError(str(error)) from error
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{tokenizer_file}: {tokenizer.vocab_size} tokens, but the model in {folder} has {model.config.vocab_size}"
        )
    tokens = generate(
        model, [tokenizer.end_of_text, *tokenizer.encode(arguments.prompt)],
        seed=arguments.seed, stop_token=tokenizer.end_of_text, **sampling,
    )  # fmt: skip
    sys.stdout.write(arguments.prompt)
    for text in tokenizer.stream(tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from . import info

    print(info())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` without the program's name, default sys.argv's."""
    arguments = _parser().parse_args(argv)
    command = {"train": _train, "generate": _generate, "info": _info}[arguments.command]
    try:
        return command(arguments)
    except InputError as error:
        code, message = 2, str(error)
    except OSError as error:
        code, message = 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except RuntimeError as error:
        from .training import Diverged

        if not isinstance(error, Diverged):
            raise
        code, message = 1, str(error)
    print(f"fastllm {arguments.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
