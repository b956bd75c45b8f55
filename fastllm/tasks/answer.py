"""Answers to questions as spans of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..data import Tokenizer
from ..models.mode import evaluation_mode
from .features import Features, check_asked, windows

# An answer has at most this many tokens, as in BERT's run_squad.py.
MAX_TOKENS = 30


@dataclass(frozen=True)
class Span:
    """``text`` is the context's characters [start, end); empty where the model finds none. ``score``: a log-probability
    of its first and last token within their window."""

    text: str
    start: int
    end: int
    score: float


class _Place(NamedTuple):
    """A span of a window's text: its log-probability, and its first and last tokens' characters, (begin, end)."""

    score: float
    first: tuple[int, int]
    last: tuple[int, int]


def _likeliest(starts: torch.Tensor, ends: torch.Tensor, offsets: list) -> _Place | None:
    """The likeliest span of at most :data:`MAX_TOKENS` of the window's text; None where it has no text."""
    inside = torch.tensor([o is not None for o in offsets])
    first = starts.log_softmax(-1)[: len(offsets)].masked_fill(~inside, -torch.inf)
    last = ends.log_softmax(-1)[: len(offsets)].masked_fill(~inside, -torch.inf)
    scores = first[:, None] + last[None, :]
    ones = torch.ones_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(~(ones.triu() & ones.tril(MAX_TOKENS - 1)), -torch.inf)
    place, score = int(scores.argmax()), float(scores.max())
    if score == -torch.inf:
        return None
    return _Place(score, offsets[place // len(offsets)], offsets[place % len(offsets)])


def _span(place: _Place, text: str) -> Span:
    begin, end = place.first[0], place.last[1]
    # A byte-level piece takes the space before its word with it.
    begin += len(text[begin:end]) - len(text[begin:end].lstrip())
    found = text[begin:end].rstrip()
    return Span(found, begin, begin + len(found), place.score)


@torch.no_grad()
def answers(
    model, tokenizer: Tokenizer, questions: Sequence[tuple[str, str]], *, rows: int = 16, allow_none: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> list[Span]:  # fmt: skip
    """For each (question, text) the likeliest span, over all windows of the text.

    Args:
        model: an :class:`fastllm.models.Encoder` with a span head; run in evaluation mode and left as it was.
        rows: windows at a time.
        allow_none: no answer (an empty text) where the first token, which stands for it, is likelier in every window.
        done: told how many windows are read, as it goes.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range; names it.
    """
    check_asked(model, "span_logits", questions, rows)
    device = next(model.parameters()).device
    context = model.config.context_length
    todo = [
        (number, window)
        for number, (question, text) in enumerate(questions)
        for window in windows(question, text, tokenizer, context)
    ]
    best: dict[int, _Place] = {}
    none: dict[int, float] = {}
    with evaluation_mode(model):
        for begin in range(0, len(todo), rows):
            part = todo[begin : begin + rows]
            fillers = {"tokens": tokenizer.special("sep"), "segments": 1}
            features = Features([window for _, window in part], fillers, {"lengths": "tokens"})
            batch = features.batch(range(len(part)))
            segments = batch["segments"].to(device) if model.config.segments else None
            encoded = model.encode(batch["tokens"].to(device), batch["lengths"], segments)
            starts, ends = (logits.float().cpu() for logits in model.span_logits(encoded))
            for (number, window), start, end in zip(part, starts, ends, strict=True):
                place = _likeliest(start, end, window["_offsets"])
                if place is not None and (number not in best or place.score > best[number].score):
                    best[number] = place
                nothing = float(start.log_softmax(-1)[0] + end.log_softmax(-1)[0])
                none[number] = min(none.get(number, 0.0), nothing)
            done(begin + len(part))
    result = []
    for number, (_, text) in enumerate(questions):
        place = best.get(number)
        if place is None or (allow_none and none[number] > place.score):
            result.append(Span("", 0, 0, none[number]))
        else:
            result.append(_span(place, text))
    return result
