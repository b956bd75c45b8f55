"""Score a model on held-out data: BLEU and chrF of translations, accuracy and F1 of labels, exact match and F1 of
answers; bits per byte of a language model, its divergence from a teacher, and its scores on BLiMP, prompts with
answers, and preferences."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ..config import InputError, tell_unused
from ..data import read_corpus, write_token_file
from ..data.token_file import open_token_file
from ..files import folder_to_fill, write_text
from ..tasks.answer import answers
from ..tasks.classify import classify
from ..tasks.metrics import (
    TOKENIZERS,
    confusion,
    f1_macro,
    signatures,
    squad_scores,
    suggested_tokenizer,
    translation_intervals,
    translation_scores,
    wilson_interval,
)  # fmt: skip
from ..tasks.minimal_pairs import Paradigm, blimp_scores, read_blimp
from ..tasks.read import read_labelled, read_pairs, read_questions
from ..tasks.translate import translate
from ..training.checkpoints.checkpoint import load_config
from ..training.evaluate import evaluate
from ..training.objectives.distill import student_scores
from ._model import (
    add_model_arguments,
    add_search_arguments,
    chosen_folder,
    given,
    load_for,
    search_options,
    task_of,
    unused_in_search,
)
from ._prompts import ROWS, beside, form_asked, scores_of_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "data", nargs="*", metavar="FILE",
        help="data in the form that the model was trained on; for language models text, or JSON lines of prompts with "
        "answers or of prompt, chosen and rejected",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="RUN",
        help="preferences: the run or model that margins are over (default: the one that the run started from)",
    )  # fmt: skip
    parser.add_argument(
        "--beta", type=float, metavar="X", help="preferences: the factor of the margins (default: the run's, else 0.1)"
    )
    parser.add_argument(
        "--teacher", metavar="RUN",
        help="language models: also the divergence from this run or model, in nats per token",
    )  # fmt: skip
    parser.add_argument(
        "--blimp",
        metavar="FOLDER",
        help="language models: minimal pairs in BLiMP's form, one .jsonl file for each paradigm",
    )
    add_search_arguments(parser)
    parser.add_argument(
        "--tokenize", choices=TOKENIZERS,
        help="translations: sacrebleu's tokens for BLEU; zh, ja-mecab, ko-mecab or char where words have no spaces "
        f"(default: {TOKENIZERS[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help="only the first N examples, or N pairs of each paradigm of BLiMP; 0: all (default: 0)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="write predictions and the picture of a classifier's confusion")


def _translations(model, tokenizer, examples, arguments) -> tuple[dict, list[dict]]:
    references = [e["target"] for e in examples]
    tokenize = arguments.tokenize or TOKENIZERS[0]
    named = signatures(tokenize)
    better = suggested_tokenizer(references)
    if better != "13a" and tokenize in ("13a", "intl"):
        print(f"hint: for BLEU in the language of these references sacrebleu has --tokenize {better}", file=sys.stderr)
    found = translate(model, tokenizer, [e["source"] for e in examples], **search_options(arguments))
    intervals = translation_intervals(references, found, tokenize)
    scores = {}
    for name, score in translation_scores(references, found, tokenize).items():
        scores |= {name: score, f"{name}_interval": intervals[name], f"{name}_signature": named[name]}
    return scores, [{**e, "translation": text} for e, text in zip(examples, found, strict=True)]


def _labels(model, tokenizer, examples, arguments) -> tuple[dict, list[dict]]:
    names = model.config.labels
    for example in examples:
        if example["label"] not in names:
            raise InputError(f"label {example['label']!r} is not among the model's: {', '.join(names)}")
    labels = [names.index(e["label"]) for e in examples]
    predicted = classify(model, tokenizer, [e["text"] for e in examples]).argmax(-1).tolist()
    if arguments.out:
        from ..training.reports.curves import plot_confusion

        plot_confusion(confusion(labels, predicted, len(names)), names, Path(arguments.out) / "confusion.png")
    right = sum(a == b for a, b in zip(labels, predicted, strict=True))
    interval = wilson_interval(right, len(labels))
    scores = {
        "accuracy": right / len(labels),
        "accuracy_interval": interval,
        "f1": f1_macro(labels, predicted, len(names)),
    }
    return scores, [{**e, "predicted": names[p]} for e, p in zip(examples, predicted, strict=True)]


def _answers(model, tokenizer, examples, arguments) -> tuple[dict, list[dict]]:
    none = any(not e["answers"] for e in examples)
    found = answers(model, tokenizer, [(e["question"], e["context"]) for e in examples], allow_none=none)
    scores = squad_scores([e["answers"] for e in examples], [span.text for span in found])
    return scores, [{**e, "found": span.text} for e, span in zip(examples, found, strict=True)]


TASKS = {
    "translate": (read_pairs, _translations),
    "classify": (read_labelled, _labels),
    "answer": (read_questions, _answers),
}


def _text(model, tokenizer, arguments) -> dict:
    corpus = read_corpus(arguments.data, remove_repeated=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "held-out.bin"
        write_token_file(path, [*corpus.train, *corpus.validation], tokenizer)
        held_out, context = open_token_file(path, tokenizer), model.config.context_length
        if arguments.teacher is None:
            result = evaluate(model, held_out, context, ROWS)
        else:
            teacher = beside(arguments.teacher, "teacher", tokenizer).to(model.head.weight.device)
            context = min(context, teacher.config.context_length)
            result = student_scores(model, teacher, held_out, context, ROWS)
    return {**result.scores, "loss": result.loss, "tokens": result.tokens}


def _language(model, tokenizer, arguments, paradigms: list[Paradigm]) -> tuple[dict, list[dict]]:
    """Scores on the text that is given, and on BLiMP; without a text the bits per byte are BLiMP's."""
    with torch.inference_mode():
        text = _text(model, tokenizer, arguments) if arguments.data else {}
        if not paradigms:
            return text, []
        some = [replace(p, pairs=p.pairs[: arguments.limit or None]) for p in paradigms]
        scores, predictions = blimp_scores(model, tokenizer, some)
    interval = wilson_interval(scores.pop("right"), scores["pairs"])
    sentences = "blimp_bits_per_byte" if text else "bits_per_byte"
    first = {"pairs": scores.pop("pairs"), "blimp": scores.pop("blimp"), "blimp_interval": interval,
             sentences: scores.pop("bits_per_byte")}  # fmt: skip
    return {**first, **text, **scores}, predictions


def run(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 0:
        raise InputError(f"limit: expected at least 0, got {arguments.limit}")
    search_options(arguments)
    with folder_to_fill(arguments.out) if arguments.out else contextlib.nullcontext() as out:
        return _run(arguments, out)


def _shown(name: str, value) -> str:
    """A score in words: a number, an interval of 95%, a text, or numbers by name."""
    if isinstance(value, dict):
        return "\n".join([f"{name}:", *(f"  {_shown(key.replace('_', ' '), part)}" for key, part in value.items())])
    if isinstance(value, tuple):
        return f"{name}: {value[0]:.4f} to {value[1]:.4f} (95%)"
    if isinstance(value, float):
        return f"{name}: {value:.4f}"
    return f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}"


def _run(arguments: argparse.Namespace, out: Path | None) -> int:
    if not arguments.data and arguments.blimp is None:
        raise InputError("data: expected files to score on, or --blimp and a folder")
    folder = chosen_folder(arguments)
    task = task_of(load_config(folder))
    if arguments.blimp is not None and task != "generate":
        raise InputError(f"blimp: {folder}: this model is for fastllm {task}; minimal pairs are for language models")
    form = form_asked(arguments, task)
    options = ("beams", "length_penalty", "tokenize")
    unused = unused_in_search(arguments)
    if task != "translate":
        unused = {name: f"it is for translations, and this model is for fastllm {task}" for name in options}
    if task == "generate" and form is None and arguments.blimp is None:
        unused["limit"] = "it is for examples and pairs, and a text is scored as a whole"
    tell_unused(unused, given(arguments, *options, "limit"), "command line")
    paradigms = [] if arguments.blimp is None else read_blimp(arguments.blimp)
    model, tokenizer = load_for(folder, arguments.device)
    predictions = []
    if form is not None:
        scores, predictions = scores_of_prompts(model, tokenizer, form, arguments)
    elif task in TASKS:
        read, score = TASKS[task]
        examples = read(arguments.data)
        examples = examples[: arguments.limit] if arguments.limit else examples
        scores, predictions = score(model, tokenizer, examples, arguments)
        scores = {"examples": len(examples), **scores}
    elif task == "generate":
        scores, predictions = _language(model, tokenizer, arguments, paradigms)
    else:
        raise InputError(
            f"{folder}: an encoder without a task has no score of its own; its run's metrics.jsonl has them"
        )
    for name, value in scores.items():
        print(_shown(name.replace("_", " "), value))
    if out is not None:
        write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
        write_text(
            out / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
        )
    return 0
