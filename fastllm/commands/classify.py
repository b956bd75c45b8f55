"""Label texts, with a model that fastllm train --objective classify made."""

from __future__ import annotations

import argparse

from ..tasks.classify import classify
from ._model import add_model_arguments, chosen_folder, given_texts, load_for, on_a_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to judge")
    parser.add_argument("--file", metavar="FILE", help="a text on each line; - reads standard input")


def run(arguments: argparse.Namespace) -> int:
    texts = given_texts(arguments.texts, arguments.file)
    model, tokenizer = load_for(chosen_folder(arguments), arguments.device, "classify")
    for text, row in zip(texts, classify(model, tokenizer, texts), strict=True):
        best = int(row.argmax())
        print(f"{model.config.labels[best]}\t{row[best]:.3f}\t{on_a_line(text)}")
    return 0
