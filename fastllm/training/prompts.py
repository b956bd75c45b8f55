"""Prompts as a run's data: conversations as text, what fits into the context, what the reference makes of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..config import InputError
from ..data import Tokenizer
from ..tasks.features import answer_ids, pair_parts
from ..tasks.preferences import score_pairs, with_reference
from ..tasks.prompts import SIDES, rendered
from ..tasks.store import TaskDataset, prepare_examples
from .checkpoints.model_folder import load_language_model
from .config import RunConfig
from .device import pick_device


def fitting(examples: list[dict], tokenizer: Tokenizer, context: int) -> list[dict]:
    """Those of ``examples``, as text, whose answers are read with their prompts within ``context`` tokens.

    Raises:
        InputError: an example has no token to learn; names its number. Or none fits.
    """
    kept, shortest = [], math.inf
    for number, example in enumerate(examples, 1):
        sides = [example] if "parts" in example else [pair_parts(example, name) for name in SIDES]
        lengths = []
        for side in sides:
            ids, learned = answer_ids(side, tokenizer)
            if not any(learned[1:]):
                raise InputError(f"data: example {number}: all its tokens are ignored: none is an answer's")
            lengths.append(len(ids) - 1)
        shortest = min(shortest, max(lengths))
        if max(lengths) <= context:
            kept.append(example)
    if not kept:
        raise InputError(f"context_length: no example fits into {context} tokens; the shortest has {shortest}")
    return kept


def prepare_prompts(
    config: RunConfig, folder: Path, name: str, parts: tuple[list[dict], list[dict]], tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> TaskDataset:  # fmt: skip
    """Training and held-out examples, as :mod:`fastllm.tasks.prompts` reads them, prepared in ``folder``.

    Of pairs the log-probabilities under the pretrained model are computed here, once, in fp32, and kept with them.

    Raises:
        InputError: a chat template does not serve, or the examples do not.
        OSError: the folder cannot be written.
    """
    objective, context = config.objective, config.model.context_length
    whole = [[rendered(example, tokenizer) for example in part] for part in parts]
    train, validation = (fitting(part, tokenizer, context) for part in whole)
    left = sum(map(len, whole)) - len(train) - len(validation)
    notes = [f"{left:,} of more than {context:,} tokens left out"] if left else []
    dataset = prepare_examples(folder, objective.objective, name, train, validation, tokenizer, notes=notes)
    if objective.objective != "dpo":
        return dataset
    say(f"reference: {len(dataset.train) + len(dataset.validation):,} pairs under {objective.pretrained}")
    model = load_language_model(objective.pretrained or "", "pretrained").to(pick_device(config.training.device))

    def score(features):
        return score_pairs(model, features, config.training.rows)

    train, validation = (
        with_reference(part.examples, score, tokenizer, context) for part in (dataset.train, dataset.validation)
    )
    return prepare_examples(
        folder, objective.objective, name, train, validation, tokenizer, notes=dataset.summary.notes
    )  # fmt: skip
