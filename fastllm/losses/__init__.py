"""Losses of post-training, as pure functions of log-probabilities.

Log-probabilities come from :func:`fastllm.functional.linear_log_probs`, which never holds all the logits. Preference
losses and reward modelling take one number a sequence, policy-gradient losses one a token. Each returns the mean loss,
a scalar in at least fp32; with ``return_metrics=True`` a pair of it and a dict of what people log, detached scalars.
"""

from .policy_gradient import dapo, dr_grpo, group_advantages, grpo, gspo, kl_estimate, ppo
from .preference import cpo, dpo, kto, orpo, reward_model, sequence_log_probs, simpo, unpack

__all__ = [
    "cpo",
    "dapo",
    "dpo",
    "dr_grpo",
    "group_advantages",
    "grpo",
    "gspo",
    "kl_estimate",
    "kto",
    "orpo",
    "ppo",
    "reward_model",
    "sequence_log_probs",
    "simpo",
    "unpack",
]
