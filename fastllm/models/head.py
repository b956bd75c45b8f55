"""The output layer of a language model."""

from __future__ import annotations

import torch

from .. import nn as fast
from ..functional import cross_entropy, linear_kl_div, linear_log_probs

# Logits up to which a step holds them all: on a CPU with matrix units, forward and backward of a step took 1.05 to 1.07
# of the time in chunks at 0.4 and 2 million logits, and 0.89 at 34 million (medians of 7 pairs, bf16).
WHOLE_LOGITS = 2**24


class Head(fast.LinearCrossEntropyHead):
    """A linear layer to the vocabulary's logits, which can also give their loss."""

    def loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, logit_scale: float = 1.0, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Mean cross-entropy in nats (fp32 scalar) of ``targets`` (...) given ``hidden`` (..., hidden_size).

        A target of -100 is ignored. More than :data:`WHOLE_LOGITS` logits are never held all at once: a few rows of
        them at a time become their own gradient.

        Raises:
            TypeError: ``targets`` is no tensor.
        """
        if not isinstance(targets, torch.Tensor):
            raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
        if targets.numel() * self.out_features > WHOLE_LOGITS:
            return self(hidden, targets, logit_scale=logit_scale, label_smoothing=label_smoothing).float()
        logits = self(hidden).flatten(0, -2)
        return cross_entropy(
            logits, targets.flatten(), logit_scale=logit_scale, label_smoothing=label_smoothing
        ).float()

    def log_probs(self, hidden: torch.Tensor, targets: torch.Tensor, logit_scale: float = 1.0) -> torch.Tensor:
        """The log-probability of each of ``targets`` (...), of their shape, in at least fp32; 0 for a -100."""
        return linear_log_probs(hidden, self.weight, targets, temperature=1.0 / logit_scale)

    def divergence(self, hidden, teacher_hidden, teacher_weight, targets, **options) -> torch.Tensor:
        """The mean divergence from a teacher's layer, whose rows are all given, where ``targets`` are not -100.

        Args:
            options: ``direction``, ``temperature`` and ``beta`` of :func:`fastllm.functional.linear_kl_div`.
        """
        return linear_kl_div(hidden, self.weight, teacher_hidden, teacher_weight, target=targets, **options)
