"""Translate texts with a model that fastllm train --objective seq2seq made; one translation a line."""

from __future__ import annotations

import argparse

from ..config import tell_unused
from ..tasks.translate import translate_lines
from ._model import (
    add_model_arguments,
    add_search_arguments,
    chosen_folder,
    given,
    given_texts,
    load_for,
    on_a_line,
    search_options,
    unused_in_search,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to translate")
    parser.add_argument(
        "--file", metavar="FILE", help="a text on each line, a blank one stays blank; - reads standard input"
    )
    add_search_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    options = search_options(arguments)
    tell_unused(unused_in_search(arguments), given(arguments, "length_penalty"), "command line")
    texts = given_texts(arguments.texts, arguments.file, blank=True)
    model, tokenizer = load_for(chosen_folder(arguments), arguments.device, "translate")
    for text in translate_lines(model, tokenizer, texts, **options):
        print(on_a_line(text))
    return 0
