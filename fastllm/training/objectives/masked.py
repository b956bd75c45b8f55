"""Objectives of an encoder on a stream of tokens: masked tokens, next sentences, both (Devlin et al. 2019).

Masks, pairs and replacements are drawn anew for every step from a counter-based generator (Philox) keyed by the data,
the seed, the step and the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ...config import InputError
from ...data import Dataset, TokenFile, Tokenizer, derive_seed
from ...data.batches import IGNORE, shuffled
from ...tasks.features import padded
from ..evaluate import Evaluation, evaluating, mean_losses
from ..objective import Batch, TrainedModel, target_count, to_device

# Of the tokens chosen for prediction: replaced with the mask, replaced with any token; the rest stay.
MASKED, REPLACED = 0.8, 0.1


def generator(*key: object) -> np.random.Generator:
    """A generator of its own for ``key``."""
    return np.random.Generator(np.random.Philox(derive_seed(*key)))


class Pieces:
    """Which pieces of a vocabulary begin words, as tables over ids.

    ``begins``: the piece begins a word by itself; ``closes``: the piece after it begins one anyhow, since it ends with
    no letter or digit; ``special``: not text.
    """

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        wordpiece = any(tokenizer.token(index).startswith("##") for index in range(size))
        # A part of a character's bytes reads as U+FFFD and belongs to the word around it.
        text = [tokenizer.token_bytes(index).decode("utf-8", "replace") for index in range(size)]
        inner = [[c.isalnum() or c == "\ufffd" for c in (piece[:1], piece[-1:])] for piece in text]
        if wordpiece:
            self.begins = np.array([not tokenizer.token(index).startswith("##") for index in range(size)], bool)
            self.closes = np.zeros(size, bool)
        else:
            self.begins, self.closes = ~np.array(inner, bool).T
            # A space belongs to the word after it.
            self.closes &= ~np.array([piece.isspace() for piece in text], bool)
        self.special = np.zeros(size, bool)
        self.special[[tokenizer.end_of_text, *tokenizer.special_tokens.values()]] = True

    def words(self, ids: np.ndarray) -> np.ndarray:
        """The number of the word that each of ``ids`` belongs to, from 0."""
        starts = self.begins[ids].copy()
        starts[1:] |= self.closes[ids[:-1]]
        starts[:1] = False
        return np.cumsum(starts)


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: BERT's rule.

    Attributes:
        probability: part of the allowed tokens to choose.
        most: never more than this many.
        mask: the id that stands for a hidden token.
        vocabulary: ids that replace a token now and then.
    """

    probability: float
    most: int
    mask: int
    vocabulary: np.ndarray


def mask_tokens(
    ids: np.ndarray, words: np.ndarray, allowed: np.ndarray, how: Masking, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens of ``ids`` (changed in place), whole words at a time, and hide them.

    Args:
        ids: (tokens,), integers.
        words: (tokens,), the number of the word that each token belongs to.
        allowed: (tokens,), True where a token may be chosen.

    Returns:
        The positions chosen, in order, and the ids that were there.
    """
    places = np.flatnonzero(allowed)
    wanted = min(how.most, max(1, round(how.probability * len(places))))
    if len(places) == 0:
        return places, ids[places]
    _, word = np.unique(words[places], return_inverse=True)
    order = rng.permutation(word[-1] + 1)
    sizes = np.bincount(word)[order]
    # Words in their drawn order while they fit; one that does not fit is skipped.
    chosen, total = np.zeros(len(sizes), bool), 0
    for number, size in zip(order, sizes, strict=True):
        if total + size <= wanted:
            chosen[number] = True
            total += size
        if total == wanted:
            break
    if not total:  # a single word longer than all that was wanted
        chosen[order[0]] = True
    places = places[chosen[word]][: how.most]
    was = ids[places].copy()
    draw = rng.random(len(places))
    ids[places[draw < MASKED]] = how.mask
    swapped = places[(draw >= MASKED) & (draw < MASKED + REPLACED)]
    ids[swapped] = rng.choice(how.vocabulary, len(swapped))
    return places, was


class Sentences:
    """Where a token file's sentences begin, which document each belongs to, and where that ends."""

    def __init__(self, tokens: TokenFile):
        self.starts = np.asarray(tokens.sentence_starts, np.int64)
        documents = np.asarray(tokens.document_starts, np.int64)
        self.document = np.searchsorted(documents, self.starts, side="right") - 1
        # Each document is followed by an end-of-text token.
        self.ends = np.append(documents[1:] - 1, len(tokens) - 1)[self.document]
        self.documents = len(np.unique(self.document))

    def __len__(self) -> int:
        return len(self.starts)


class MaskedLM:
    """Masked tokens predicted from the text around them, and optionally whether two texts follow each other.

    A row is ``[CLS] A [SEP] B [SEP]``, or without ``pairs`` ``[CLS] text [SEP]``. With them B is half of the time
    what follows A in its document, and otherwise from another one.

    Args:
        masking: hide tokens and predict them.
        pairs: predict whether B follows A.
        probability: part of the tokens that are chosen.
        whole_word: all pieces of a word or none.

    A batch: ``tokens``, ``segments`` (B, S), ``lengths`` (B,); with masking ``positions`` and ``targets`` (B, M), -100
    where a row has fewer; with pairs ``next`` (B,), 0 where B follows A.
    """

    def __init__(
        self, dataset: Dataset, context_length: int, batch_size: int, seed: int, *, masking: bool = True,
        pairs: bool = False, probability: float = 0.15, whole_word: bool = True,
    ):  # fmt: skip
        self.dataset, self.context_length, self.batch_size, self.seed = dataset, context_length, batch_size, seed
        self.masking, self.pairs, self.whole_word = masking, pairs, whole_word
        tokenizer = dataset.tokenizer
        self.pieces = Pieces(tokenizer)
        self.cls, self.sep, mask = (tokenizer.special(role) for role in ("cls", "sep", "mask"))
        self._room = context_length - (3 if pairs else 2)
        if self._room < 8:
            raise InputError(f"context_length: an encoder's rows need at least 11 tokens, got {context_length}")
        # BERT's max_predictions_per_seq; a last whole word may want one or two more.
        self.most = math.ceil(probability * self._room) if masking else 0
        self._how = Masking(probability, self.most, mask, np.flatnonzero(~self.pieces.special))
        self._train = Sentences(dataset.train)
        self._validation = Sentences(dataset.validation)
        for part, sentences in (("training", self._train), ("validation", self._validation)):
            if not len(sentences):
                raise InputError(f"data: no sentence in the {part} text")
            if pairs and sentences.documents < 2:
                raise InputError(
                    f"data: next-sentence pairs need at least two documents in the {part} text, it has one; give more "
                    "files"
                )

    def _text(self, tokens: TokenFile, start: int, end: int) -> np.ndarray:
        return np.asarray(tokens.tokens[start:end], np.int64)

    def _pair(self, tokens: TokenFile, sentences: Sentences, number: int, rng) -> tuple[np.ndarray, np.ndarray, int]:
        """Two texts, A from sentence ``number`` on, and whether B is from elsewhere."""
        start, end = int(sentences.starts[number]), int(sentences.ends[number])
        half = self._room // 2
        # A is as many whole sentences as fit into half of the room and leave something of the document: of two short
        # texts nobody can tell whether they belong together.
        cut = sentences.starts[number + 1 :][: max(1, half)]
        cut = cut[(cut < end) & (cut <= start + half)]
        middle = int(cut[-1]) if len(cut) else min(end, start + half)
        elsewhere = bool(rng.random() < 0.5) or middle >= end
        if elsewhere:
            others = np.flatnonzero(sentences.document != sentences.document[number])
            other = int(rng.choice(others))
            first, last = int(sentences.starts[other]), int(sentences.ends[other])
        else:
            first, last = middle, end
        a = self._text(tokens, start, middle)
        return a, self._text(tokens, first, min(last, first + self._room - len(a))), int(elsewhere)

    def _row(self, tokens: TokenFile, sentences: Sentences, number: int, rng) -> dict:
        if self.pairs:
            a, b, other = self._pair(tokens, sentences, number, rng)
            parts, row = [[self.cls], a, [self.sep], b, [self.sep]], {"next": other}
            segments = np.repeat([0, 1], [len(a) + 2, len(b) + 1])
        else:
            start = int(sentences.starts[number])
            text = self._text(tokens, start, min(start + self._room, int(sentences.ends[number])))
            parts, row = [[self.cls], text, [self.sep]], {}
            segments = np.zeros(len(text) + 2, np.int64)
        ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
        if self.masking:
            words = self.pieces.words(ids) if self.whole_word else np.arange(len(ids))
            positions, targets = mask_tokens(ids, words, ~self.pieces.special[ids], self._how, rng)
            row |= {"positions": positions, "targets": targets}
        return row | {"tokens": ids, "segments": segments}

    def _batch(
        self, tokens: TokenFile, sentences: Sentences, numbers: np.ndarray, *key: object, first: int = 0
    ) -> Batch:
        """``first``: how many rows with this ``key`` come before these."""
        rows = [
            self._row(tokens, sentences, int(number), generator("masked", tokens.sha256, *key, row))
            for row, number in enumerate(numbers, first)
        ]
        width = self.context_length
        batch = {
            "tokens": padded([row["tokens"] for row in rows], self.sep, width),
            "segments": padded([row["segments"] for row in rows], 0, width),
            "lengths": torch.tensor([len(row["tokens"]) for row in rows]),
        }
        if self.masking:
            batch["positions"] = padded([row["positions"] for row in rows], 0, self.most)
            batch["targets"] = padded([row["targets"] for row in rows], IGNORE, self.most)
        if self.pairs:
            batch["next"] = torch.tensor([row["next"] for row in rows])
        return batch

    def batch(self, step: int, done: float = 1.0) -> Batch:
        sample = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        numbers = shuffled(sample, len(self._train), "sentences", self.dataset.train.sha256, self.seed)
        return self._batch(self.dataset.train, self._train, numbers, self.seed, step)

    def counts(self, batch: Batch) -> dict[str, int]:
        counts = {}
        if self.masking:
            counts["mlm"] = target_count(batch)
        if self.pairs:
            counts["nsp"] = len(batch["next"])
        return counts

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(batch["lengths"].sum())

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        encoded = model.encode(batch["tokens"], batch["lengths"], batch["segments"] if self.pairs else None)
        losses = {}
        if self.masking:
            losses["mlm"] = model.masked_loss(encoded, batch["positions"], batch["targets"])
        if self.pairs:
            losses["nsp"] = nn.functional.cross_entropy(model.next_logits(encoded).float(), batch["next"])
        return losses

    def _held_out(self, rows: int, limit: int) -> Iterator[Batch]:
        # Windows of sentences overlap, and all of them would score the text several times. So only as many are taken as
        # would fill it side by side, spread evenly over it.
        count, whole = len(self._validation), -(-len(self.dataset.validation) // self._room)
        numbers = np.arange(0, count, max(1, count // min(limit or whole, whole)))
        for first in range(0, len(numbers), rows):
            some = numbers[first : first + rows]
            yield self._batch(self.dataset.validation, self._validation, some, "evaluation", first=first)

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        device = next(model.parameters()).device
        right: int | torch.Tensor = 0
        total = 0
        with evaluating(model):
            losses, counts = mean_losses(self, model, self._held_out(rows, limit), dtype)
            for batch in self._held_out(rows, limit) if self.pairs else ():
                batch = to_device(batch, device)
                encoded = model.encode(batch["tokens"], batch["lengths"], batch["segments"])
                right = right + (model.next_logits(encoded).argmax(-1) == batch["next"]).sum()
                total += len(batch["next"])
        scores = {f"{name}_loss": loss for name, loss in losses.items()}
        if self.pairs:
            scores["nsp_accuracy"] = int(right) / total
        main = "mlm_loss" if self.masking else "nsp_accuracy"
        return Evaluation(sum(losses.values()), counts.get("mlm", total), scores, main, not limit)
