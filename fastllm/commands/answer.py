"""Answer questions by passages of a text, with a model that fastllm train --objective answer made."""

from __future__ import annotations

import argparse
import sys

from ..config import InputError
from ..tasks.answer import answers
from ..tasks.show import marked
from ._model import add_model_arguments, chosen_folder, given_texts, load_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--question", action="append", required=True, metavar="TEXT", help="may be given repeatedly")
    parser.add_argument("--context", metavar="TEXT", help="the text to find the answer in")
    parser.add_argument("--file", metavar="FILE", help="a file with that text; - reads standard input")
    parser.add_argument("--allow-none", action="store_true", help="say so if the text has no answer")


def run(arguments: argparse.Namespace) -> int:
    context = "\n".join(given_texts([arguments.context] if arguments.context else [], arguments.file))
    if not all(question.strip() for question in arguments.question):
        raise InputError("question: expected a question, got an empty text")
    model, tokenizer = load_for(chosen_folder(arguments), arguments.device, "answer")
    asked = [(question, context) for question in arguments.question]
    for question, span in zip(
        arguments.question, answers(model, tokenizer, asked, allow_none=arguments.allow_none), strict=True
    ):
        print(question)
        if not span.text:
            print("  (no answer in the text)")
            continue
        shown = marked(context, span.start, span.end)
        if sys.stdout.isatty():
            shown = shown.replace("[", "\033[1;7m").replace("]", "\033[0m")
        print(f"  {' '.join(span.text.split())}\n  {shown}")
    return 0
