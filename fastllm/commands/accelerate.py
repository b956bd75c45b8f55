"""What fastllm.accelerate would do to a model in transformers' format: what it would swap, what it would leave, and
why. No weights are read: the model is built from its config.json, without memory for its parameters. With --run it is
built with random weights, and one training step on random tokens shows what serves each call.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import InputError

REPORT_SHAPE, RUN_SHAPE = (8, 1024), (1, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="a folder with transformers' config.json")
    parser.add_argument("--report", action="store_true", help="print the report (the default)")
    parser.add_argument(
        "--run", action="store_true",
        help="build the model with random weights, train it one step on random tokens and print what served each call",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--only", action="append", metavar="NAME", help="consider only this op or module path")
    parser.add_argument("--skip", action="append", metavar="NAME", help="leave this op or module path alone")
    parser.add_argument(
        "--shape", metavar="BxT",
        help="batch and length of the estimate, or of the step "
        f"(default: {REPORT_SHAPE[0]}x{REPORT_SHAPE[1]}, with --run {RUN_SHAPE[0]}x{RUN_SHAPE[1]})",
    )  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--shape: expected two positive numbers as in 8x1024, got {text!r}")
    return int(parts[0]), int(parts[1])


def _build(folder: Path, device: str):
    """The model of ``folder``'s configuration, on ``device``: "meta" takes no memory."""
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
        with torch.device(device):
            return transformers.AutoModel.from_config(config) if named is None else named._from_config(config)
    except Exception as error:  # foreign code: its checks of a configuration have classes of their own
        raise InputError(f"{folder / 'config.json'}: transformers cannot build this model: {error}") from error


def _step(model, batch: int, length: int) -> None:
    """One forward and backward on random tokens."""
    import inspect

    import torch

    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(model.config, "vocab_size"):
        raise InputError(f"--run: expected a model of token ids, got {type(model).__name__}")
    ids = torch.randint(model.config.vocab_size, (batch, length))
    labelled = "labels" in inspect.signature(model.forward).parameters and model.get_output_embeddings() is not None
    try:
        output = model.train()(input_ids=ids, **({"labels": ids} if labelled else {}))
        loss = output.loss if labelled else output[0].float().square().mean()
        loss.backward()
    except Exception as error:  # foreign code
        raise InputError(f"--run: {type(model).__name__} does not take {batch} x {length} tokens: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    from .. import accelerate

    default = RUN_SHAPE if arguments.run else REPORT_SHAPE
    batch, length = default if arguments.shape is None else _shape(arguments.shape)
    model = _build(Path(arguments.folder), "cpu" if arguments.run else "meta")
    try:
        report = accelerate(model, only=arguments.only, skip=arguments.skip, dry_run=not arguments.run)
    except ValueError as error:
        raise InputError(str(error)) from error
    estimate = report.estimate(batch, length)
    calls = None
    if arguments.run:
        with report.calls() as calls:
            _step(model, batch, length)
    if arguments.json:
        served = {} if calls is None else {"calls": json.loads(calls.to_json())}
        print(json.dumps({**json.loads(report.to_json()), "estimate": vars(estimate), **served}, indent=1))
    else:
        print(report)
        print(f"\none training step of {batch} x {length} tokens, modelled for an H200: {estimate}")
        if calls is not None:
            print(f"\nwhat served one training step of {batch} x {length} random tokens here:\n{calls}")
    return 0
