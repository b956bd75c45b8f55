"""The arguments by which commands name a trained model and a device, and the folder that they mean."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..config import InputError
from ..training import RUNS
from ..training.checkpoint import MANIFEST, check, find_checkpoint


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run`` or ``--model``, and ``--device``."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="FOLDER", help="a run's folder (default: the newest in runs)")
    source.add_argument("--model", metavar="FOLDER", help="config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def model_folder(arguments: argparse.Namespace) -> Path:
    """The folder with weights and tokenizer; checked against its manifest, where it has one."""
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
