"""Objectives on a stream of tokens in which what comes is predicted: causal and prefix language models."""

from __future__ import annotations

import math

import numpy as np
import torch

from ...data import Batches, Dataset, derive_seed, evaluation_batches
from ...data.batches import IGNORE
from ..evaluate import Evaluation, evaluate, evaluating, mean_losses
from ..objective import Batch, TrainedModel, target_count

# How much shorter windows are while they are short, and how many more of them a batch has. docs/recipe.md has the gain.
SHORTER = 4
# Part of a run of new weights in which they are.
SHORT_WINDOWS = 0.5


def perplexity(nats: float) -> float:
    """exp(nats), infinite where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class CausalLM:
    """Each token predicted from those before it. A batch is ``tokens`` and ``targets``, one token later.

    Args:
        short_windows: part of the run, from its beginning, whose windows are a quarter of ``context_length`` long. A
            batch then has four times as many of them: as many tokens, from more places of the text.
    """

    def __init__(
        self, dataset: Dataset, context_length: int, batch_size: int, seed: int, *, short_windows: float = 0.0
    ):  # fmt: skip
        self.dataset, self.context_length, self.seed = dataset, context_length, seed
        self._batches = Batches(dataset.train, context_length, batch_size, seed)
        self._short_windows = short_windows
        self._short = Batches(dataset.train, max(1, context_length // SHORTER), batch_size * SHORTER, seed)

    def batch(self, step: int, done: float = 1.0) -> Batch:
        tokens, targets = (self._short if done < self._short_windows else self._batches)(step)
        return {"tokens": tokens, "targets": targets}

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"loss": target_count(batch)}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return batch["tokens"].numel()

    @staticmethod
    def losses(model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": model.loss(batch["tokens"], batch["targets"])}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        return evaluate(model, self.dataset.validation, self.context_length, rows, dtype, limit)


class PrefixLM(CausalLM):
    """The rest of a window predicted, given its beginning, which is read in both directions (Raffel et al. 2020).

    Each row's prefix has 1 to half of its tokens: a function of (data, seed, step, row). A batch adds ``prefix`` (B,).
    """

    def _prefixed(self, tokens: torch.Tensor, targets: torch.Tensor, *key: object, first: int = 0) -> Batch:
        """``first``: how many rows with this ``key`` come before these."""
        lengths = [
            np.random.Generator(np.random.Philox(derive_seed("prefix", self.dataset.train.sha256, *key, row))).integers(
                1, max(2, tokens.shape[1] // 2 + 1)
            )
            for row in range(first, first + len(tokens))
        ]
        prefix = torch.tensor(np.array(lengths, np.int64))
        # The last token of the prefix predicts the first one after it.
        within = torch.arange(tokens.shape[1]) < prefix[:, None] - 1
        return {"tokens": tokens, "targets": targets.masked_fill(within, IGNORE), "prefix": prefix}

    def batch(self, step: int, done: float = 1.0) -> Batch:
        return self._prefixed(*self._batches(step), self.seed, step)

    @staticmethod
    def losses(model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": model.loss(batch["tokens"], batch["targets"], batch["prefix"])}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        tokens = self.dataset.validation.tokens
        windows = evaluation_batches(tokens, self.context_length, self.context_length, rows, limit)
        batches = (self._prefixed(*window, "evaluation", first=number * rows) for number, window in enumerate(windows))
        with evaluating(model):
            losses, counts = mean_losses(self, model, batches, dtype)
        return Evaluation(
            losses["loss"], counts["loss"], {"perplexity": perplexity(losses["loss"])}, "perplexity", not limit
        )
