"""The command line: ``fastllm train``, ``fastllm generate``, ``fastllm bench``, ``fastllm info``.

Exit codes: 0 done; 1 a run failed (disk full, loss not finite); 2 the input was refused before any work; 130 and 143
stopped by SIGINT and SIGTERM. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from .config import InputError, add_flags, flags_given, read_toml, settings
from .version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse's, with errors on one line, no abbreviated flags, and the nearest flag to one that does not exist."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, extras = super().parse_known_args(args, namespace)
        if extras:
            near = difflib.get_close_matches(extras[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(extras)}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace, extras

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

    commands.add_parser("bench", add_help=False, help="time the ops beside their rivals (fastllm bench --help)")

    commands.add_parser("info", help="versions, hardware, and which backend serves each op here and why")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from .data import DataConfig, Tokenizer
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
        # Check the file by itself first, so that a message names the file only for what it says.
        build_run_config(file, str(arguments.config))
        merged = {title: {**file.get(title, {}), **table} for title, table in tables.items()}
        # A preset on the command line replaces the file's whole model.
        merged["model"] = {**({} if arguments.preset else file.get("model", {})), **model}
        config = build_run_config(merged, "command line", arguments.preset)
        if config.data.tokenizer and "vocab_size" in merged["model"]:
            available = Tokenizer.load(config.data.tokenizer).vocab_size
            if available != config.model.vocab_size:
                raise InputError(
                    f"{config.data.tokenizer}: {available} tokens do not match vocab_size {config.model.vocab_size}"
                )
        result = train(config, arguments.out, quiet=arguments.quiet)
    return 128 + result.signal if result.signal else 0


def _model_folder(arguments: argparse.Namespace) -> Path:
    """The folder with weights and tokenizer; checked against its manifest, where it has one."""
    from .training import RUNS
    from .training.checkpoint import MANIFEST, check, find_checkpoint

    if arguments.model is not None:
        folder = Path(arguments.model)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        if (folder / MANIFEST).exists():
            check(folder)
        return folder
    if arguments.run is not None:
        run = Path(arguments.run)
    else:
        runs = sorted((path for path in RUNS.glob("*") if (path / "config.toml").exists()), key=os.path.getmtime)
        if not runs:
            raise InputError("no run in runs; train one with fastllm train, or name a --run or --model")
        run = runs[-1]
    if (run / "model").is_dir():
        check(run / "model")
        return run / "model"
    return find_checkpoint(run)


def _generate(arguments: argparse.Namespace) -> int:
    from .data import Tokenizer
    from .generate import check_sampling, generate
    from .models import Transformer
    from .training.loop import pick_device
    from .training.progress import printable

    sampling = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    try:
        check_sampling(**sampling)
    except ValueError as error:
        raise InputError(str(error)) from error
    device = pick_device(arguments.device)
    folder = _model_folder(arguments)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    try:
        model = Transformer.from_pretrained(folder).to(device)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens do not match the model's vocab_size "
            f"{model.config.vocab_size}"
        )
    tokens = generate(
        model, [tokenizer.end_of_text, *tokenizer.encode(arguments.prompt)],
        seed=arguments.seed, stop_token=tokenizer.end_of_text, **sampling,
    )  # fmt: skip
    sys.stdout.write(arguments.prompt)
    for text in tokenizer.stream(tokens):
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from . import info

    print(info())
    return 0


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"fastllm: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` without the program's name, default sys.argv's."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from .bench.run import main as bench

        return bench(argv[1:])
    arguments = _parser().parse_args(argv)
    command = {"train": _train, "generate": _generate, "info": _info}[arguments.command]
    from .registry import BackendError, chosen_backend

    try:
        with _one_line_warnings():
            try:
                chosen_backend()
            except ValueError as error:
                raise InputError(str(error)) from error
            return command(arguments)
    except (InputError, BackendError) as error:
        code, message = 2, str(error)
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        code, message = 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except (RuntimeError, MemoryError) as error:
        from .training import Diverged

        code, message = 1, str(error)
        # torch has a class of its own for a full GPU, and only a message for full host memory.
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate|not enough memory", message):
            message = f"out of memory; a smaller model or --micro-batch-size needs less ({message})"
        elif not isinstance(error, Diverged):
            raise
    print(f"fastllm {arguments.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
