"""How likely a language model finds the two answers of a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad

from ..data import Tokenizer
from ..data.batches import IGNORE
from ..losses import sequence_log_probs
from ..models.mode import evaluation_mode
from .features import Features, preference_features
from .prompts import SIDES

if TYPE_CHECKING:
    from ..models import LanguageModel


def pair_log_probs(model: LanguageModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed log-probabilities (B,) of the chosen and of the rejected answers, fp32, differentiable.

    Args:
        model: a :class:`fastllm.models.LanguageModel`.
        batch: of :func:`preference_features`, on the model's device. Both answers take one forward pass.
    """
    width = max(batch[name].shape[1] for name in SIDES)
    tokens, targets = (
        torch.cat([pad(batch[name + end], (0, width - batch[name].shape[1]), value=value) for name in SIDES])
        for end, value in (("", 0), ("_targets", IGNORE))
    )
    log_probs = model.head.log_probs(model.hidden(tokens), targets, model.config.logit_scale)
    chosen, rejected = sequence_log_probs(log_probs, targets != IGNORE).chunk(2)
    return chosen, rejected


def score_pairs(model: LanguageModel, features: Features, rows: int) -> dict[str, torch.Tensor]:
    """``chosen`` and ``rejected``: the log-probabilities of all pairs, (N,) on the CPU, in the order of ``features``.

    In evaluation mode and without gradients.
    """
    device = next(model.parameters()).device
    found = {name: torch.empty(len(features)) for name in SIDES}
    # The longest first: what does not fit into memory shows at once, and little is padding.
    numbers = np.argsort(-features.sizes(), kind="stable")
    with evaluation_mode(model), torch.no_grad():
        for first in range(0, len(numbers), rows):
            some = numbers[first : first + rows]
            batch = {name: tensor.to(device) for name, tensor in features.batch(some).items()}
            for name, values in zip(SIDES, pair_log_probs(model, batch), strict=True):
                found[name][torch.from_numpy(some)] = values.cpu()
    return found


def with_reference(examples: list[dict], score: Callable[[Features], dict], tokenizer: Tokenizer, context: int):
    """``examples``, which all fit into ``context``, each with its answers' log-probabilities under the reference."""
    scores = score(preference_features(examples, tokenizer, context))
    chosen, rejected = (scores[name].tolist() for name in SIDES)
    return [
        {**example, "reference": {"chosen": a, "rejected": b}}
        for example, a, b in zip(examples, chosen, rejected, strict=True)
    ]


def right_pairs(scores: dict[str, torch.Tensor]) -> int:
    """In how many pairs the chosen answer is strictly the likelier one."""
    return int((scores["chosen"] > scores["rejected"]).sum())


def preference_scores(
    scores: dict[str, torch.Tensor], reference: dict[str, torch.Tensor] | None, beta: float
) -> dict[str, float]:
    """How often the chosen answer is the likelier one, and how often more so than for a reference.

    ``preference_accuracy``: the share of pairs whose chosen answer is the likelier one.
    ``reward_accuracy`` and ``margin``, with a reference: of beta times the gain in log-probability over it, the share
    of pairs in which the chosen answer's is the larger one, and the mean difference.
    """
    found = {"preference_accuracy": right_pairs(scores) / len(scores["chosen"])}
    if reference is not None:
        gain = (scores["chosen"] - reference["chosen"]) - (scores["rejected"] - reference["rejected"])
        found |= {"reward_accuracy": (gain > 0).float().mean().item(), "margin": beta * gain.mean().item()}
    return found
