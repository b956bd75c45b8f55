"""What fastllm.accelerate would do to a model in transformers' format: a table, and what is left and why.

Nothing is changed and no weights are read: the model is built from its config.json, without memory for its parameters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import InputError

REPORT_SHAPE = (8, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a folder with transformers' config.json")
    parser.add_argument("--report", action="store_true", help="print the report (the default; there is nothing else)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--only", action="append", metavar="NAME", help="consider this op or module path alone")
    parser.add_argument("--skip", action="append", metavar="NAME", help="leave this op or module path")
    parser.add_argument(
        "--shape", default="x".join(map(str, REPORT_SHAPE)), metavar="BxT",
        help="batch and length that the estimate is for (default: %(default)s)",
    )  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--shape: expected two positive numbers as in 8x1024, got {text!r}")
    return int(parts[0]), int(parts[1])


def _build(folder: Path):
    """The model of ``folder``'s configuration, on the meta device."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there")
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"transformers is needed to build a model from its config.json (pip install transformers): {error}"
        ) from error
    import torch

    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config) if named is None else named._from_config(config)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    from .. import accelerate

    batch, length = _shape(arguments.shape)
    model = _build(Path(arguments.folder))
    try:
        report = accelerate(model, only=arguments.only, skip=arguments.skip, dry_run=True)
    except ValueError as error:
        raise InputError(str(error)) from error
    estimate = report.estimate(batch, length)
    if arguments.json:
        print(json.dumps({**json.loads(report.to_json()), "estimate": vars(estimate)}, indent=1))
    else:
        print(report)
        print(f"\none training step of {batch} x {length} tokens, modelled for an H200: {estimate}")
    return 0
