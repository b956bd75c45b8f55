"""Examples as the arrays that models read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..config import InputError
from ..data import Tokenizer
from ..data.batches import IGNORE
from .prompts import SIDES

# Part of the room for a text by which the windows of a long one advance. A guess.
STRIDE = 0.5


def check_asked(model: Any, method: str, texts: Sequence, rows: int) -> None:
    """Refuse what a task cannot work on: a model without ``method``, one text for several, no number of rows.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if not hasattr(model, method):  # a compiled model is of another class
        raise TypeError(f"model: expected one with {method}, got {type(model).__name__}")
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, got one text")
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected a whole number of at least 1, got {rows!r}")


def padded(rows: Sequence[Sequence[int] | np.ndarray], filler: int, width: int | None = None) -> torch.Tensor:
    """``rows`` as one tensor (rows, width) of int64, filled up at the right; as wide as the longest without a width."""
    table = np.full((len(rows), max(map(len, rows)) if width is None else width), filler, np.int64)
    for out, row in zip(table, rows, strict=True):
        out[: len(row)] = row
    return torch.from_numpy(table)


@dataclass
class Features:
    """``rows``: for each example arrays and numbers by name. ``fillers``: what fills arrays up; others are numbers.

    What a name that begins with an underscore has is no part of a batch.

    ``measures``: name of a batch's entry with the length of an array -> that array's name.
    """

    rows: list[dict]
    fillers: dict[str, int]
    measures: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self) -> np.ndarray:
        """Tokens of each row."""
        return self.lengths().sum(1)

    def lengths(self) -> np.ndarray:
        """(rows, arrays): the length of each array of tokens."""
        names = [name for name in self.fillers if name != "segments"]
        return np.array([[len(row[name]) for name in names] for row in self.rows], np.int64).reshape(-1, len(names))

    def batch(self, numbers: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """int64 tensors of the rows ``numbers``, as wide as their longest."""
        rows = [self.rows[number] for number in numbers]
        result = {}
        for name in rows[0]:
            if name in self.fillers:
                result[name] = padded([row[name] for row in rows], self.fillers[name])
            elif not name.startswith("_"):
                result[name] = torch.tensor([row[name] for row in rows])
        for name, array in self.measures.items():
            result[name] = torch.tensor([len(row[array]) for row in rows])
        return result


def source_ids(text: str, tokenizer: Tokenizer, room: int) -> list[int]:
    """A source text's tokens and its end, cut to ``room``."""
    return [*tokenizer.encode(text)[: room - 1], tokenizer.end_of_text]


def pair_features(examples: list[dict], tokenizer: Tokenizer, context: int) -> Features:
    """Sources and targets; end-of-text ends both and starts the target. Pairs that are too long are left out."""
    end, rows = tokenizer.end_of_text, []
    for example in examples:
        source, target = (tokenizer.encode(example[side]) for side in ("source", "target"))
        if max(len(source), len(target)) < context:
            rows.append({"source": [*source, end], "tokens": [end, *target], "targets": [*target, end]})
    return Features(rows, {"source": end, "tokens": end, "targets": IGNORE}, {"lengths": "source"})


def text_ids(text: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """``[CLS] text [SEP]``, the text cut to what fits: its beginning and, a quarter, its end (Sun et al. 2019)."""
    ids, room = tokenizer.encode(text), context - 2
    if len(ids) > room:
        ids = ids[: room - room // 4] + ids[-(room // 4) :]
    return [tokenizer.special("cls"), *ids, tokenizer.special("sep")]


def class_features(examples: list[dict], tokenizer: Tokenizer, context: int, labels: Sequence[str]) -> Features:
    """Texts and the numbers of their labels.

    Raises:
        InputError: a label is not among ``labels``.
    """
    rows = []
    for number, example in enumerate(examples, 1):
        if example["label"] not in labels:
            raise InputError(f"example {number}: label {example['label']!r} is not among {', '.join(labels)}")
        rows.append({"tokens": text_ids(example["text"], tokenizer, context), "labels": labels.index(example["label"])})
    return Features(rows, {"tokens": tokenizer.special("sep")}, {"lengths": "tokens"})


def windows(question: str, text: str, tokenizer: Tokenizer, context: int) -> list[dict]:
    """``[CLS] question [SEP] text [SEP]``, in overlapping windows of the text where it is long.

    Each has ``tokens``, ``segments``, and ``_offsets``: for each token the characters of the text, None outside.
    """
    cls, sep = tokenizer.special("cls"), tokenizer.special("sep")
    asked = tokenizer.encode(question)[: context // 2]
    ids, offsets = tokenizer.encode_with_offsets(text)
    room = context - len(asked) - 3
    stride = max(1, int(room * STRIDE))
    result, start = [], 0
    while True:
        piece = ids[start : start + room]
        head = [cls, *asked, sep]
        result.append(
            {"tokens": [*head, *piece, sep], "segments": [0] * len(head) + [1] * (len(piece) + 1),
             "_offsets": [*[None] * len(head), *offsets[start : start + room], None]}
        )  # fmt: skip
        if start + room >= len(ids):
            return result
        start += stride


def span_features(examples: list[dict], tokenizer: Tokenizer, context: int) -> Features:
    """A row for each window; ``start`` and ``end`` are the first answer's tokens, 0 where the window lacks it."""
    rows = []
    for example in examples:
        answer = example["answers"][0] if example["answers"] else None
        for window in windows(example["question"], example["context"], tokenizer, context):
            first = last = 0
            if answer is not None:
                begin, end = answer["start"], answer["start"] + len(answer["text"])
                inside = [i for i, o in enumerate(window["_offsets"]) if o and o[0] < end and o[1] > begin]
                whole = (
                    inside and window["_offsets"][inside[0]][0] <= begin and window["_offsets"][inside[-1]][1] >= end
                )
                if whole:
                    first, last = inside[0], inside[-1]
            rows.append({**window, "start": first, "end": last})
    return Features(rows, {"tokens": tokenizer.special("sep"), "segments": 1}, {"lengths": "tokens"})


def answer_ids(example: dict, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of an example to learn from, and which of them are an answer's, its end included."""
    end = tokenizer.end_of_text
    ids, learned = ([], []) if example["templated"] else ([end], [False])
    for text, answer in example["parts"]:
        if example["templated"]:
            some = tokenizer.encode_template(text)
        else:
            some = [*tokenizer.encode(text), *([end] if answer else [])]
        ids += some
        learned += [bool(answer)] * len(some)
    return ids, learned


def pair_parts(example: dict, name: str) -> dict:
    """The side ``name`` of a pair as an example to learn from."""
    return {"parts": [[example["prompt"], False], [example[name], True]], "templated": example["templated"]}


def _predicting(example: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens, and the one that follows each, which counts where it is an answer's."""
    ids, learned = answer_ids(example, tokenizer)
    return ids[:-1], [token if counts else IGNORE for token, counts in zip(ids[1:], learned[1:], strict=True)]


def answer_features(examples: list[dict], tokenizer: Tokenizer, context: int) -> Features:
    """``tokens`` and ``targets`` of prompts with answers. Those of more than ``context`` tokens are left out."""
    rows = []
    for example in examples:
        tokens, targets = _predicting(example, tokenizer)
        if len(tokens) <= context:
            rows.append({"tokens": tokens, "targets": targets})
    return Features(rows, {"tokens": tokenizer.end_of_text, "targets": IGNORE}, {"lengths": "tokens"})


def preference_features(examples: list[dict], tokenizer: Tokenizer, context: int) -> Features:
    """``chosen``, ``rejected`` and the targets of both, with the reference's log-probabilities where there are some.

    Pairs with an answer that makes more than ``context`` tokens are left out.
    """
    end, rows, fillers = tokenizer.end_of_text, [], {}
    for name in SIDES:
        fillers |= {name: end, f"{name}_targets": IGNORE}
    for example in examples:
        row = {}
        for name in SIDES:
            row[name], row[f"{name}_targets"] = _predicting(pair_parts(example, name), tokenizer)
            if "reference" in example:
                row[f"reference_{name}"] = float(example["reference"][name])
        if max(len(row["chosen"]), len(row["rejected"])) <= context:
            rows.append(row)
    return Features(rows, fillers, {f"{name}_lengths": name for name in SIDES})
