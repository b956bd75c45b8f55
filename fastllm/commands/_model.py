"""The arguments by which commands name a trained model and a device, and the folder that they mean."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..config import InputError, read_plain
from ..data import Tokenizer
from ..data.corpus import lines_of
from ..models import Model, ModelConfig, load_model
from ..training import RUNS
from ..training.checkpoints.checkpoint import load_config
from ..training.checkpoints.model_folder import model_folder
from ..training.config import DEVICES
from ..training.device import pick_device


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run`` or ``--model``, and ``--device``."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="FOLDER", help="a run's folder (default: the newest in runs)")
    source.add_argument("--model", metavar="FOLDER", help="config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")


# Beams of a search, and the power of the length, where none is given.
BEAMS, LENGTH_PENALTY = 4, 1.0


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """``--beams`` and ``--length-penalty``."""
    parser.add_argument(
        "--beams", type=int, metavar="N", help=f"translations: beams of the search; 1: greedy (default: {BEAMS})"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="X",
        help="translations by beams: power of the length that divides the log-probability; 0 favours short ones "
        f"(default: {LENGTH_PENALTY})",
    )  # fmt: skip


def search_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :func:`fastllm.tasks.translate.translate` that ``--beams`` and ``--length-penalty`` ask for.

    Raises:
        InputError: one of them is out of its range.
    """
    beams = BEAMS if arguments.beams is None else arguments.beams
    penalty = LENGTH_PENALTY if arguments.length_penalty is None else arguments.length_penalty
    if beams < 1:
        raise InputError(f"beams: expected at least 1, got {beams}")
    if not 0 <= penalty < float("inf"):
        raise InputError(f"length_penalty: expected at least 0, got {penalty}")
    return {"beams": beams, "length_penalty": penalty}


def unused_in_search(arguments: argparse.Namespace) -> dict[str, str]:
    """Which of ``--beams`` and ``--length-penalty`` has no effect on translations, and why."""
    return {"length_penalty": "one beam is a greedy search, which compares no lengths"} if arguments.beams == 1 else {}


def given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Those of ``names`` that the command line has."""
    return [name for name in names if getattr(arguments, name) is not None]


def chosen_folder(arguments: argparse.Namespace) -> Path:
    """The folder with weights and tokenizer that ``--model`` or ``--run`` names, else the newest run's; checked."""
    named = arguments.run if arguments.model is None else arguments.model
    if named is None:
        runs = sorted((path for path in RUNS.glob("*") if (path / "config.toml").exists()), key=os.path.getmtime)
        if not runs:
            raise InputError("no run in runs; train one with fastllm train, or name a --run or --model")
        named = runs[-1]
    if arguments.model is None and not Path(named).is_dir():
        raise InputError(f"{named}: no such run")
    return model_folder(named)


def task_of(config: ModelConfig) -> str:
    """The task that a model of this configuration is for: a command's name, or "mlm" for an encoder without a task."""
    if config.decoder != "none":
        return "generate" if config.encoder == "none" else "translate"
    return {"classify": "classify", "span": "answer"}.get(config.heads[-1] if config.heads else "", "mlm")


def load_for(folder: Path, device: str, task: str | None = None) -> tuple[Model, Tokenizer]:
    """The model in ``folder`` and its tokenizer.

    Raises:
        InputError: there is none, the two do not belong together, or the model is for another task than ``task``.
    """
    where = pick_device(device)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    config = load_config(folder)
    if task is not None and task_of(config) != task:
        raise InputError(f"{folder}: this model is for fastllm {task_of(config)}, not for fastllm {task}")
    if config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens do not match the model's vocab_size "
            f"{config.vocab_size}"
        )
    if config.decoder == "none":
        tokenizer.special("cls")
    try:
        return load_model(folder).to(where), tokenizer
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error


def on_a_line(text: str) -> str:
    """``text`` without line ends; every other character is kept, so that it scores as ``fastllm eval`` scores it."""
    return re.sub("[\r\n]+", " ", text)


def given_texts(texts: list[str], file: str | None, *, blank: bool = False) -> list[str]:
    """The texts on the command line, else the lines of ``file`` ("-": standard input).

    Args:
        blank: lines of the file without text are given too; else they are left out.

    Raises:
        InputError: there is no text, one of the command line is empty, or the file is missing or not UTF-8.
    """
    if texts and file:
        raise InputError("--file: texts are given on the command line too")
    if file is not None:
        try:
            content = sys.stdin.buffer.read() if file == "-" else read_plain(file)
            lines = lines_of(content.decode("utf-8-sig"))
            filled = [line for line in lines if line.strip()]
            texts = lines if blank and filled else filled
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text (offset {error.start})") from error
    if not any(text.strip() for text in texts):
        raise InputError("no text given; write it on the command line, or name a --file (- reads standard input)")
    empty = None if file else next((n for n, text in enumerate(texts, 1) if not text.strip()), None)
    if empty:
        raise InputError(f"text {empty} of {len(texts)} is empty")
    return texts
