"""Translate texts with a model that fastllm train --objective seq2seq made; one translation a line."""

from __future__ import annotations

import argparse

from ..config import InputError
from ..tasks.translate import translate
from ._model import (
    add_length_penalty,
    add_model_arguments,
    check_length_penalty,
    chosen_folder,
    given_texts,
    load_for,
    on_a_line,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to translate")
    parser.add_argument("--file", metavar="FILE", help="a text on each line; - reads standard input")
    parser.add_argument(
        "--beams", type=int, default=4, metavar="N", help="beams of the search; 1: greedy (default: %(default)s)"
    )
    add_length_penalty(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.beams < 1:
        raise InputError(f"beams: expected at least 1, got {arguments.beams}")
    check_length_penalty(arguments)
    texts = given_texts(arguments.texts, arguments.file)
    model, tokenizer = load_for(chosen_folder(arguments), arguments.device, "translate")
    options = dict(beams=arguments.beams, length_penalty=arguments.length_penalty)
    for text in translate(model, tokenizer, texts, **options):
        print(on_a_line(text))
    return 0
