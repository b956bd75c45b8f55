"""Translations of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data import Tokenizer
from ..generate.search import beam_search, greedy
from ..models.mode import evaluation_mode
from .features import check_asked, padded, source_ids

# A translation has at most this many times the source's tokens, whose number is rounded up to a multiple of BUCKET.
RATIO, BUCKET = 2, 8


def translate(
    model, tokenizer: Tokenizer, texts: Sequence[str], *, beams: int = 4, length_penalty: float = 1.0, rows: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[str]:  # fmt: skip
    """Each of ``texts`` by ``model``, an :class:`fastllm.models.EncoderDecoder`.

    Args:
        beams: 1 takes the likeliest token again and again.
        rows: texts at a time, of similar length.
        done: told how many are translated, as it goes.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range; names it.
    """
    check_asked(model, "encode", texts, rows)
    if not isinstance(beams, int) or beams < 1:
        raise ValueError(f"beams: expected a whole number of at least 1, got {beams!r}")
    context, end = model.config.context_length, tokenizer.end_of_text
    device = model.head.weight.device
    sources = [source_ids(text, tokenizer, context) for text in texts]
    # Only texts with the same limit go together, so that a translation does not depend on the others.
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(sources)), key=lambda i: len(sources[i])):
        groups.setdefault(-(-len(sources[i]) // BUCKET) * BUCKET, []).append(i)
    parts = [(size, some[k : k + rows]) for size, some in groups.items() for k in range(0, len(some), rows)]
    result, count = [""] * len(sources), 0
    for size, part in parts:
        lengths = torch.tensor([len(sources[i]) for i in part])
        tokens = padded([sources[i] for i in part], end)
        with evaluation_mode(model), torch.inference_mode():
            memory = model.encode(tokens.to(device), lengths)
        start = torch.full((len(part), 1), end, device=device)
        options: dict[str, Any] = dict(memory=memory, max_new_tokens=RATIO * size, stop_token=end)
        if beams == 1:
            found = greedy(model, start, **options)
        else:
            ranked = beam_search(model, start, beams=beams, length_penalty=length_penalty, **options)
            found = [hypotheses[0].tokens for hypotheses in ranked]
        for i, ids in zip(part, found, strict=True):
            result[i] = tokenizer.decode(ids).strip()
        count += len(part)
        done(count)
    return result


def translate_lines(model, tokenizer: Tokenizer, lines: Sequence[str], **options: Any) -> list[str]:
    """The translation of each line, "" of one without text; ``options`` are :func:`translate`'s."""
    found = iter(translate(model, tokenizer, [line for line in lines if line.strip()], **options))
    return [next(found) if line.strip() else "" for line in lines]
