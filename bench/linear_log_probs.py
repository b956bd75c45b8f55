"""Shapes and rivals of linear_log_probs: those of linear_cross_entropy, against all the logits."""

from __future__ import annotations

from . import linear_cross_entropy

shapes = linear_cross_entropy.shapes
cpu_shapes = linear_cross_entropy.cpu_shapes


def _all_logits():
    """As trainers do without a fused op: the logits, then their log-softmax at the targets."""

    def linear_log_probs(input, linear_weight, target, *, softcap=None):
        logits = (input @ linear_weight.t()).float()
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    return linear_log_probs


rivals = {"all the logits": _all_logits}
