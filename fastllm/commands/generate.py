"""Continue a text with a model."""

from __future__ import annotations

import argparse
import sys

from ..config import InputError
from ..generate.sampling import check_sampling, generate
from ..training.reports.progress import printable
from ._model import add_model_arguments, chosen_folder, load_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the text to continue (default: none)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X",
        help="divides the logits; 0 takes the likeliest token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="X", help="sample within the nucleus of this probability only")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the draw repeatable")


def run(arguments: argparse.Namespace) -> int:
    sampling = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    try:
        check_sampling(**sampling)
    except ValueError as error:
        raise InputError(str(error)) from error
    model, tokenizer = load_for(chosen_folder(arguments), arguments.device, "generate")
    prompt = tokenizer.encode(arguments.prompt)
    tokens = generate(model, [tokenizer.end_of_text, *prompt], stop_token=tokenizer.end_of_text, **sampling)
    sys.stdout.write(arguments.prompt)
    for text in tokenizer.stream(tokens, after=prompt):
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
