"""Objectives on examples: pairs to translate, texts with labels, questions with answers in a text."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import nn

from ...config import InputError
from ...data import derive_seed
from ...data.batches import permute, shuffled
from ...tasks.features import Features, class_features, pair_features, span_features
from ...tasks.store import TaskDataset
from ..evaluate import Evaluation, evaluating, mean_losses
from ..objective import Batch, Objective, TrainedModel, target_count, to_device
from .streams import perplexity

# Label smoothing of translation (Vaswani et al. 2017).
SMOOTHING = 0.1
# The samples of this many batches are sorted by length at a time. With Multi30k's pairs in batches of 128, padding adds
# 0.12 to the tokens; it adds 0.16 with 16 batches, and 0.29 where only the sum of both sides' lengths decides.
POOL = 32


class ExampleOrder:
    """``order(step)`` -> which examples, so that each comes once per epoch and those of a batch are of similar length.

    A function of (key, step) alone: the permuted samples of :data:`POOL` batches are sorted by their longest array,
    then by the sum, cut, and the batches visited in a permuted order.

    Args:
        lengths: (examples, arrays), the lengths of each example's arrays.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, *key: object):
        self._longest, self._sum = lengths.max(1), lengths.sum(1)
        self.batch_size, self._key = batch_size, key

    def __call__(self, step: int) -> np.ndarray:
        pool, place = divmod(step, POOL)
        size = POOL * self.batch_size
        sample = pool * size + np.arange(size, dtype=np.int64)
        numbers = shuffled(sample, len(self._sum), "examples", *self._key)
        order = np.lexsort((self._sum[numbers], self._longest[numbers]))
        numbers = numbers[order].reshape(POOL, self.batch_size)
        return numbers[permute(np.array([place]), POOL, derive_seed("pool", *self._key, pool))[0]]


class ExampleObjective(Objective, ABC):
    """What the objectives on examples share."""

    def __init__(self, dataset: TaskDataset, context_length: int, batch_size: int, seed: int):
        self.dataset, self.context_length = dataset, context_length
        self.train = self._features(dataset.train.examples)
        self.validation = self._features(dataset.validation.examples)
        if not len(self.train) or not len(self.validation):
            raise InputError(f"context_length: no example fits into {context_length} tokens")
        self._order = ExampleOrder(self.train.lengths(), batch_size, dataset.train.key, seed)

    @abstractmethod
    def _features(self, examples: list[dict]) -> Features:
        """The arrays of ``examples``."""

    def batch(self, step: int, done: float = 1.0) -> Batch:
        return self.train.batch(self._order(step))

    def _whole(self, limit: int) -> bool:
        return not limit or limit >= len(self.validation)

    def _numbers(self, limit: int) -> np.ndarray:
        """Which held-out examples are scored: all, or ``limit`` of them, spread evenly."""
        count = len(self.validation)
        return np.arange(count) if self._whole(limit) else np.arange(limit) * count // limit

    def _batches(self, limit: int, rows: int):
        numbers = self._numbers(limit)
        # The longest first: what does not fit into memory shows at once, and little is padding.
        numbers = numbers[np.argsort(-self.validation.sizes()[numbers], kind="stable")]
        for first in range(0, len(numbers), rows):
            yield self.validation.batch(numbers[first : first + rows])

    def _perplexity(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        """The score of an objective whose one term is the loss of targets."""
        with evaluating(model):
            losses, counts = mean_losses(self, model, self._batches(limit, rows), dtype)
        scores = {"perplexity": perplexity(losses["loss"])}
        return Evaluation(losses["loss"], counts["loss"], scores, "perplexity", self._whole(limit))


class Seq2Seq(ExampleObjective):
    """A target text given a source text. A batch: ``source``, ``lengths``, ``tokens`` and ``targets``."""

    def __init__(self, dataset, context_length: int, batch_size: int, seed: int, *, label_smoothing: float = SMOOTHING):
        super().__init__(dataset, context_length, batch_size, seed)
        self.label_smoothing = label_smoothing

    def _features(self, examples: list[dict]) -> Features:
        return pair_features(examples, self.dataset.tokenizer, self.context_length)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"loss": target_count(batch)}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(batch["lengths"].sum()) + target_count(batch)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        # Smoothing is for learning; what is scored is the likelihood.
        smoothing = self.label_smoothing if model.training else 0.0
        names = ("source", "lengths", "tokens", "targets")
        return {"loss": model.loss(*(batch[name] for name in names), label_smoothing=smoothing)}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        return self._perplexity(model, rows, dtype, limit)


class Classify(ExampleObjective):
    """The label of a text. A batch: ``tokens``, ``lengths``, ``labels``.

    Args:
        token_dropout: part of a text's tokens that are [MASK] in training, drawn anew for every step: a label should
            not hang on one word (Iyyer et al. 2015).
    """

    def __init__(
        self, dataset, context_length: int, batch_size: int, seed: int, *, label_smoothing: float = 0.0,
        token_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(dataset, context_length, batch_size, seed)
        self.label_smoothing, self.token_dropout = label_smoothing, token_dropout
        self._key = (dataset.train.key, seed)
        self._mask = dataset.tokenizer.special("mask") if token_dropout else None

    def batch(self, step: int, done: float = 1.0) -> Batch:
        batch = super().batch(step, done)
        if self._mask is None:
            return batch
        tokens = batch["tokens"]
        generator = np.random.default_rng(derive_seed("token dropout", *self._key, step))
        dropped = torch.from_numpy(generator.random(tokens.shape) < self.token_dropout)
        # [CLS] and [SEP] stay, and what follows a text is nothing of it.
        place = torch.arange(tokens.shape[1])
        inside = (place > 0) & (place < batch["lengths"][:, None] - 1)
        return {**batch, "tokens": tokens.masked_fill(dropped & inside, self._mask)}

    def _features(self, examples: list[dict]) -> Features:
        return class_features(examples, self.dataset.tokenizer, self.context_length, self.dataset.labels)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["labels"])}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(batch["lengths"].sum())

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model.class_logits(model.encode(batch["tokens"], batch["lengths"]))
        smoothing = self.label_smoothing if model.training else 0.0
        return {"loss": nn.functional.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing)}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        from ...tasks.metrics import f1_macro

        device = next(model.parameters()).device
        predicted, labels, losses = [], [], []
        with evaluating(model):
            for batch in self._batches(limit, rows):
                labels.append(batch["labels"])
                batch = to_device(batch, device)
                logits = model.class_logits(model.encode(batch["tokens"], batch["lengths"])).float()
                losses.append(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
                predicted.append(logits.argmax(-1))
        # Read at once: until then a GPU's host need not wait.
        loss, predicted, labels = (
            sum(torch.stack(losses).tolist()), torch.cat(predicted).tolist(), torch.cat(labels).tolist()
        )  # fmt: skip
        accuracy = sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)
        scores = {"accuracy": accuracy, "f1": f1_macro(labels, predicted, len(self.dataset.labels))}
        return Evaluation(loss / len(labels), len(labels), scores, "accuracy", self._whole(limit))


class Answer(ExampleObjective):
    """Where in a text the answer to a question begins and ends; at the first token where there is none.

    A text that is too long is read in windows that overlap. A batch: ``tokens``, ``segments``, ``lengths``, ``start``
    and ``end`` (B,).
    """

    def _features(self, examples: list[dict]) -> Features:
        return span_features(examples, self.dataset.tokenizer, self.context_length)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"start": len(batch["start"]), "end": len(batch["end"])}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(batch["lengths"].sum())

    @staticmethod
    def losses(model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        encoded = model.encode(batch["tokens"], batch["lengths"], batch["segments"] if model.config.segments else None)
        logits = dict(zip(("start", "end"), model.span_logits(encoded), strict=True))
        return {name: nn.functional.cross_entropy(logits[name].float(), batch[name]) for name in logits}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        from ...tasks.answer import answers
        from ...tasks.metrics import squad_scores

        with evaluating(model):
            losses, counts = mean_losses(self, model, self._batches(limit, rows), dtype)
        examples = self.dataset.validation.examples
        examples = examples[:limit] if limit else examples
        # As fastllm eval: where some questions have no answer, none may be given.
        none = any(not e["answers"] for e in self.dataset.validation.examples)
        asked = [(e["question"], e["context"]) for e in examples]
        found = answers(model, self.dataset.tokenizer, asked, rows=rows, allow_none=none)
        scores = squad_scores([e["answers"] for e in examples], [answer.text for answer in found])
        return Evaluation(sum(losses.values()), counts["start"], scores, "f1", self._whole(limit))
