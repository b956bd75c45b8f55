"""How usual a text's words are beside a reference text: the mean log probability of a unigram model.

The measure of CCNet (Wenzek et al. 2020), Dolma and datatrove's UnigramLogProbFilter with a simpler model: frequencies
of words in the user's own reference, add-one smoothing. The order of words has no part in it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from ...config import InputError
from ..sources import Limits, Raw, SourceEntry, plan_sources, read
from .document import Document, Rejection
from .words import words_of

# A held-out piece of the reference, in words, and how few pieces tell nothing of a share: guesses.
PIECE, FEWEST = 200, 20
_MARKS = ".,;:!?()[]\"'\u201c\u201d\u2018\u2019"


def _words(text: str) -> list[str]:
    stripped = (word.casefold().strip(_MARKS) for word in words_of(text).words)
    return [word for word in stripped if word]


@dataclass(frozen=True)
class Unigram:
    """Words with their frequencies."""

    counts: Counter[str]
    total: int

    @classmethod
    def of(cls, words: list[str]) -> Unigram:
        return cls(Counter(words), len(words))

    def score(self, words: list[str]) -> float:
        """The mean of the words' log probabilities, in nats; minus infinity for no words."""
        if not words:
            return -math.inf
        count = sum(math.log(self.counts[word] + 1) for word in words)
        return count / len(words) - math.log(self.total + len(self.counts) + 1)


def _entries(path: str) -> list[SourceEntry]:
    try:
        return plan_sources([path])[0]
    except InputError as error:
        raise ValueError(f"quality_reference: {error}") from error


def reference_files(path: str) -> list[str]:
    """The files that the reference at ``path`` is read from, in order.

    Raises:
        ValueError: there is nothing at ``path``.
    """
    return list(dict.fromkeys(entry.path for entry in _entries(path)))


@cache
def reference_model(path: str, share: float) -> tuple[Unigram, float]:
    """The model of the reference text at ``path``, and the score that ``share`` of it reaches.

    Pieces of 200 words are scored by a model of the half of the reference that they are not in.

    Args:
        path: a file or folder that ``fastllm prepare`` could read: text, or JSON lines with a ``text``.

    Raises:
        ValueError: it cannot be read, or holds fewer than 20 pieces; names it.
    """
    words: list[str] = []
    for entry in _entries(path):
        if entry.format not in ("text", "jsonl"):
            raise ValueError(f"quality_reference: {entry.path}: expected text or JSON lines, got {entry.format}")
        for item in read(entry, Limits()):
            if not isinstance(item, Raw):
                raise ValueError(f"quality_reference: {entry.path}: {item.reason}")
            words += _words(item.content.decode("utf-8", "replace"))
    pieces = [words[begin : begin + PIECE] for begin in range(0, len(words) - PIECE + 1, PIECE)]
    if len(pieces) < FEWEST:
        raise ValueError(f"quality_reference: {path}: expected at least {FEWEST * PIECE:,} words, got {len(words):,}")
    # Each piece is scored by the half that it is not in; pieces in turns would share their documents with the model.
    half = len(pieces) // 2
    models = [Unigram.of([word for piece in part for word in piece]) for part in (pieces[half:], pieces[:half])]
    scores = sorted(models[number >= half].score(piece) for number, piece in enumerate(pieces))
    return Unigram.of(words), scores[min(len(scores) - 1, math.floor((1 - share) * len(scores)))]


def like_reference(document: Document, path: str, share: float) -> Document | Rejection:
    """``document`` if its words are as common as in ``share`` of the reference's own pieces."""
    model, least = reference_model(path, share)
    score = model.score(_words(document.text))
    if score >= least:
        return document
    value = round(score, 4) if math.isfinite(score) else None
    return Rejection.of(document, "quality", log_probability=value, least=round(least, 4))
