"""Objectives on prompts: answers to give, and pairs of answers of which one is preferred."""

from __future__ import annotations

from typing import Literal

import torch

from ...losses import dpo
from ...tasks.features import Features, answer_features, preference_features
from ...tasks.preferences import pair_log_probs, preference_scores, score_pairs
from ...tasks.prompts import SIDES
from ..device import autocast
from ..evaluate import Evaluation
from ..objective import Batch, TrainedModel, target_count
from .examples import ExampleObjective


class Instruct(ExampleObjective):
    """Answers given their prompts; a prompt's tokens are read and not learnt. A batch: ``tokens``, ``targets``,
    ``lengths``."""

    def _features(self, examples: list[dict]) -> Features:
        return answer_features(examples, self.dataset.tokenizer, self.context_length)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"loss": target_count(batch)}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(batch["lengths"].sum())

    @staticmethod
    def losses(model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": model.loss(batch["tokens"], batch["targets"])}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        return self._perplexity(model, rows, dtype, limit)


class DPO(ExampleObjective):
    """Direct preference optimisation of pairs whose reference log-probabilities stand with them.

    A batch: ``chosen``, ``rejected``, the targets and lengths of both, and of the reference ``reference_chosen`` and
    ``reference_rejected`` (B,), fp32.

    Args:
        beta, kind: as in :func:`fastllm.losses.dpo`.
    """

    def __init__(
        self, dataset, context_length: int, batch_size: int, seed: int, *, beta: float,
        kind: Literal["sigmoid", "hinge", "ipo"],
    ):  # fmt: skip
        super().__init__(dataset, context_length, batch_size, seed)
        self.beta = beta
        self.kind: Literal["sigmoid", "hinge", "ipo"] = kind

    def _features(self, examples: list[dict]) -> Features:
        return preference_features(examples, self.dataset.tokenizer, self.context_length)

    @staticmethod
    def counts(batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["chosen"])}

    @staticmethod
    def tokens(batch: Batch) -> int:
        return int(sum(batch[f"{name}_lengths"].sum() for name in SIDES))

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        reference = (batch[f"reference_{name}"] for name in SIDES)
        return {"loss": dpo(*pair_log_probs(model, batch), *reference, beta=self.beta, kind=self.kind)}

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        chosen = self._numbers(limit)
        features = Features([self.validation.rows[number] for number in chosen], self.validation.fillers,
                            self.validation.measures)  # fmt: skip
        with autocast(next(model.parameters()).device, dtype):
            scores = score_pairs(model, features, rows)
        reference = {name: torch.tensor([row[f"reference_{name}"] for row in features.rows]) for name in SIDES}
        loss = dpo(*(scores[name] for name in SIDES), *(reference[name] for name in SIDES), beta=self.beta,
                   kind=self.kind)  # fmt: skip
        found = preference_scores(scores, reference, self.beta)
        return Evaluation(loss.item(), len(features), found, "preference_accuracy", self._whole(limit))
