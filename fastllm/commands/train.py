"""Train a model on text. Without arguments: a tiny one on the language reference that Python carries, in under two
minutes."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from ..config import InputError, add_flags, flags_given, settings, tell_unused
from ..data import DataConfig, Tokenizer
from ..data.dataset import is_prepared, tokenizer_of
from ..models import PRESETS, ModelConfig
from ..training import RunConfig, TrainingConfig, build_run_config, resume, train
from ..training.config import DEFAULT_PRESET, read_tables
from ..training.objectives import ObjectiveConfig
from ..training.recipes import RECIPES
from ..training.setup import with_pretrained, with_teacher

# Settings by the title of their table.
Tables = Mapping[str, Mapping[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="FOLDER", help="the run's folder (default: the next free runs/NNNN)")
    run.add_argument(
        "--auto-resume", action="store_true", help="go on with the run that --out holds, if any; torchrun implies it"
    )
    run.add_argument("--resume", metavar="RUN", help="go on with this run, or from one of its checkpoints")
    run.add_argument("--config", metavar="FILE.toml", help="settings, as in a run's config.toml; flags override it")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    run.add_argument(
        "--preset",
        choices=[*PRESETS, *RECIPES],
        help=(
            f"the model's shape (default: {DEFAULT_PRESET}); {', '.join(RECIPES)}: with all settings that suit the task"
        ),
    )
    add_flags(parser, ObjectiveConfig, "objective")
    add_flags(parser, DataConfig, "data")
    add_flags(parser, ModelConfig, "model (override the preset)", PRESETS[DEFAULT_PRESET])
    add_flags(parser, TrainingConfig, "training")


def _changed(tables: Tables) -> dict[str, list[str]]:
    """The names in ``tables`` with other values than the defaults, which files of earlier versions write out."""
    defaults = RunConfig()
    return {
        title: [name for name, value in table.items() if value != getattr(getattr(defaults, title), name, None)]
        for title, table in tables.items()
    }


def _unused(config: RunConfig) -> dict[str, dict[str, str]]:
    """The settings that have no effect, by table, and why; what only the files of data tell is among them."""
    unused = config.unused()
    found = next((path for path in config.data.data if is_prepared(path)), None)
    if found is not None:
        unused["data"]["deduplicate"] = f"{found} was prepared and is taken as it is"
    unused["model"]["labels"] = "training takes them from its data"
    return unused


def _check_shape(config: RunConfig, flags: Collection[str], shape: Mapping[str, Any]) -> None:
    """Refuse another shape than the pretrained model's; a file may have that model's own, as a run's config.toml."""
    if flags:
        flag = next(iter(flags)).replace("_", "-")
        raise InputError(f"--{flag}: the model's shape comes from --pretrained {config.objective.pretrained}")
    theirs = with_pretrained(config).without_unused().model if shape else None
    for name in shape:
        if name != "labels" and getattr(config.model, name, None) != getattr(theirs, name, None):
            raise InputError(f"{name}: the model's shape comes from --pretrained {config.objective.pretrained}")


def _check_resumption(arguments: argparse.Namespace, flags: Tables) -> None:
    """Refuse settings that a resumed run keeps."""
    free = {setting.name for setting in settings(TrainingConfig) if setting.metadata.get("resume")}
    fixed = [*flags["data"], *flags["objective"], *flags["model"]]
    fixed += [name for name in flags["training"] if name not in free]
    fixed += [name for name in ("out", "config", "preset") if getattr(arguments, name) is not None]
    if fixed:
        raise InputError(f"--resume: a run keeps its settings; --{fixed[0].replace('_', '-')} cannot be given")


def _configured(arguments: argparse.Namespace, flags: Tables) -> RunConfig:
    """A new run's settings, of the file and of the command line; those without an effect are told."""
    file = read_tables(arguments.config) if arguments.config else {}
    # Check the file by itself first, so that a message names the file only for what it says.
    alone = build_run_config(file, str(arguments.config))
    for title, names in _changed(file).items():
        tell_unused(alone.unused()[title], names, str(arguments.config))
    # A preset on the command line replaces the file's whole model.
    kept = {**file, "model": {}} if arguments.preset else file
    merged = {title: {**kept.get(title, {}), **table} for title, table in flags.items()}
    config = build_run_config(merged, "command line", arguments.preset)
    if config.objective.pretrained:
        _check_shape(config, flags["model"], merged["model"])
    for title, given in flags.items():
        tell_unused(_unused(config)[title], given, "command line")
    tokenizer = tokenizer_of(with_teacher(with_pretrained(config)).data)
    if tokenizer and "vocab_size" in merged["model"]:
        available = Tokenizer.load(tokenizer).vocab_size
        if available != config.model.vocab_size:
            raise InputError(f"{tokenizer}: {available} tokens do not match vocab_size {config.model.vocab_size}")
    return config


def run(arguments: argparse.Namespace) -> int:
    kinds = {"data": DataConfig, "training": TrainingConfig, "objective": ObjectiveConfig, "model": ModelConfig}
    flags = {title: flags_given(arguments, kind) for title, kind in kinds.items()}
    if arguments.resume is not None:
        _check_resumption(arguments, flags)
        result = resume(arguments.resume, flags["training"], quiet=arguments.quiet)
    else:
        config = _configured(arguments, flags)
        result = train(config, arguments.out, quiet=arguments.quiet, auto_resume=arguments.auto_resume)
    return 128 + result.signal if result.signal else 0
