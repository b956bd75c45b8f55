"""Policy-gradient losses over the tokens of sampled answers, with a clipped ratio, a KL penalty, an entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops.shared.check import check_choice, check_integer
from ..ops.shared.signature import keywords_of
from .checks import bounded, check_tensor, readable, wide, with_metrics
from .preference import token_mask

KL_ESTIMATORS = ("k1", "k2", "k3")


class Tokens(NamedTuple):
    """A batch, checked, in at least fp32; 0 where ``kept`` is False."""

    loss: str
    log_probs: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor
    kept: torch.Tensor

    def mean(self, values):
        """Over all tokens of the batch."""
        return values.sum() / self.kept.sum()


def _tokens(loss: str, log_probs, old_log_probs, advantages, mask) -> Tokens:
    kept = token_mask(loss, log_probs, mask)
    shape = log_probs.shape
    check_tensor(loss, "advantages", advantages, log_probs)
    if advantages.shape not in (shape, shape[:1]):
        raise ValueError(
            f"{loss}: advantages must be of shape {list(shape[:1])} or {list(shape)}, got {list(advantages.shape)}"
        )
    if old_log_probs is not None:
        check_tensor(loss, "old_log_probs", old_log_probs, log_probs, shape)
    if readable(kept) and not bool(kept.any()):
        raise ValueError(f"{loss}: no token counts: mask is 0 everywhere, or the batch is empty")
    # Before anything is computed: what stands under the mask's zeros may be anything, and inf * 0 is NaN.
    new = torch.where(kept, wide(log_probs), 0.0)
    old = new if old_log_probs is None else torch.where(kept, wide(old_log_probs), 0.0)
    gain = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    return Tokens(loss, new, new - old.detach(), torch.where(kept, wide(gain).detach(), 0.0), kept)


def kl_estimate(log_probs, reference_log_probs, estimator="k3"):
    """KL(policy || reference) for each token, estimated on samples (Schulman 2020, "Approximating KL divergence").

    With d = reference_log_probs - log_probs: "k1" is -d, which is unbiased and has a high variance. "k2" is d^2 / 2,
    which is biased. "k3" is exp(d) - 1 - d, which is unbiased and never negative.

    Args:
        log_probs, reference_log_probs: of one shape, floating point.

    Raises:
        TypeError, ValueError: a shape, dtype or device does not fit, or the estimator does not exist.
    """
    check_tensor("kl_estimate", "log_probs", log_probs)
    check_tensor("kl_estimate", "reference_log_probs", reference_log_probs, log_probs, log_probs.shape)
    check_choice("kl_estimate", "estimator", estimator, KL_ESTIMATORS)
    d = wide(reference_log_probs) - wide(log_probs)
    return -d if estimator == "k1" else d.square() / 2 if estimator == "k2" else torch.expm1(d) - d


def group_advantages(rewards, group_size, *, normalize=True, eps=1e-4):
    """The advantages of answers to a prompt over one another (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    Args:
        rewards: (B,), floating point; every ``group_size`` consecutive ones belong to one prompt.
        normalize: divide by the group's standard deviation plus ``eps``, as GRPO does; Dr. GRPO does not.

    Returns:
        (B,), rewards minus their group's mean.

    Raises:
        TypeError, ValueError: a shape or dtype does not fit; B is not a multiple of ``group_size``, which must be at
            least 2.
    """
    check_tensor("group_advantages", "rewards", rewards)
    check_integer("group_advantages", "group_size", group_size)
    if rewards.dim() != 1 or len(rewards) == 0 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"group_advantages: rewards must be of shape (B,), B a multiple of a group_size of at least 2; got "
            f"{list(rewards.shape)} and {group_size}"
        )
    eps = bounded("group_advantages", "eps", eps, open_end=False)
    groups = wide(rewards).view(-1, group_size)
    gain = groups - groups.mean(1, keepdim=True)
    return (gain / (groups.std(1, keepdim=True) + eps) if normalize else gain).flatten()


def _bounds(loss: str, clip: Any) -> tuple[float, float]:
    """(below, above) of a number or a pair."""
    if isinstance(clip, tuple | list) and len(clip) != 2:
        raise ValueError(f"{loss}: clip must be a number or a pair, below and above, got {clip}")
    pair: Any = clip if isinstance(clip, tuple | list) else (clip, clip)
    low, high = pair
    return bounded(loss, "clip", low), bounded(loss, "clip", high)


def _over_tokens(values, kept):
    return values.sum() / kept.sum()


def _over_sequences(values, kept):
    """The mean over sequences of each one's mean over tokens; one without tokens counts as 0."""
    return (values.sum(1) / kept.sum(1).clamp(min=1)).mean()


def policy_gradient(
    tokens: Tokens, log_ratio, average: Callable, *, clip, reference_log_probs=None, beta=0.0, kl_estimator="k3",
    entropy=None, entropy_coef=0.0, return_metrics=False,
):  # fmt: skip
    """What these losses share: ``average`` of -min(ratio A, clip(ratio) A) + beta KL - entropy_coef entropy.

    ``log_ratio``: one for each token, (B, T), or for a whole sequence, (B, 1). ``average(values, kept)``: a scalar.
    """
    loss, kept = tokens.loss, tokens.kept
    low, high = _bounds(loss, clip)
    beta = bounded(loss, "beta", beta, open_end=False)
    entropy_coef = bounded(loss, "entropy_coef", entropy_coef, open_end=False)
    check_choice(loss, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, coefficient, tensor, of in (
        ("beta", beta, reference_log_probs, "reference_log_probs"), ("entropy_coef", entropy_coef, entropy, "entropy")
    ):  # fmt: skip
        if tensor is not None:
            check_tensor(loss, of, tensor, kept, kept.shape)
        elif coefficient:
            raise ValueError(f"{loss}: {name} is {coefficient}, which needs {of}")
    ratio, gain = log_ratio.exp(), tokens.advantages
    values = -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
    clipped = ((ratio < 1 - low) & (gain < 0)) | ((ratio > 1 + high) & (gain > 0))
    metrics = {
        "clip_share": tokens.mean((clipped & kept).to(ratio.dtype)),
        "ratio": tokens.mean(torch.where(kept, ratio, 0.0)),
        "approx_kl": tokens.mean(torch.where(kept, torch.expm1(tokens.log_ratio) - tokens.log_ratio, 0.0)),
    }
    if reference_log_probs is not None:
        reference = torch.where(kept, wide(reference_log_probs), 0.0).detach()
        penalty = kl_estimate(tokens.log_probs, reference, kl_estimator)
        values = values + beta * penalty
        metrics["kl"] = tokens.mean(penalty)
    if entropy is not None:
        bonus = torch.where(kept, wide(entropy), 0.0)
        values = values - entropy_coef * bonus
        metrics["entropy"] = tokens.mean(bonus)
    return with_metrics(average(values, kept), metrics, return_metrics)


@keywords_of(policy_gradient)
def ppo(log_probs, old_log_probs, advantages, mask, *, clip=0.2, **options):
    """The clipped loss of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7): the mean over all tokens.

    With ratio = exp(log_probs - old_log_probs) a token's loss is
    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) + beta KL - entropy_coef entropy.

    Args:
        log_probs: (B, T), floating point, of the sampled tokens under the policy; they get the gradient.
        old_log_probs: (B, T), under the policy that sampled them, or None if that is this policy. No gradient.
        advantages: (B,) for whole answers or (B, T). No gradient.
        mask: (B, T), boolean or numbers; tokens where it is not 0 count. Values elsewhere have no influence.
        clip: positive, how far the ratio may move from 1; a pair: below and above.
        reference_log_probs: (B, T), under the reference model of the KL penalty. No gradient.
        beta: the factor of the KL penalty.
        kl_estimator: "k1", "k2" or "k3", see :func:`kl_estimate`.
        entropy: (B, T), as :func:`fastllm.functional.linear_log_probs` returns it.
        entropy_coef: the factor of the entropy.

    Returns:
        The loss. Metrics, means over all tokens: clip_share, the share of tokens whose clipped term is the smaller one;
        ratio; approx_kl, the divergence from the old policy, exp(d) - 1 - d of the log-ratio d; kl and entropy where
        given.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit; on CPU, no token counts.
    """
    tokens = _tokens("ppo", log_probs, old_log_probs, advantages, mask)
    return policy_gradient(tokens, tokens.log_ratio, _over_tokens, clip=clip, **options)


@keywords_of(policy_gradient)
def grpo(log_probs, old_log_probs, advantages, mask, *, clip=0.2, **options):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, equation 3).

    :func:`ppo`'s loss of each token, averaged over an answer's tokens, and then over the answers. Arguments, returned
    values and errors are :func:`ppo`'s; :func:`group_advantages` makes the advantages (B,). An answer without tokens,
    such as one that was cut off and is masked, counts as 0. The paper's penalty is ``beta=0.04`` with "k3".
    """
    tokens = _tokens("grpo", log_probs, old_log_probs, advantages, mask)
    return policy_gradient(tokens, tokens.log_ratio, _over_sequences, clip=clip, **options)


@keywords_of(policy_gradient)
def dapo(log_probs, old_log_probs, advantages, mask, *, clip=(0.2, 0.28), **options):
    """DAPO (Yu et al. 2025, arXiv:2503.14476, equation 8): the mean over all tokens, with a wider clip above 1 than
    below.

    Arguments, returned values and errors are :func:`ppo`'s.
    """
    tokens = _tokens("dapo", log_probs, old_log_probs, advantages, mask)
    return policy_gradient(tokens, tokens.log_ratio, _over_tokens, clip=clip, **options)


@keywords_of(policy_gradient)
def dr_grpo(log_probs, old_log_probs, advantages, mask, *, clip=0.2, max_length=None, **options):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2): the sum over tokens, divided by B times a constant.

    So the length of an answer does not change the weight of its tokens. Arguments, returned values and errors are
    :func:`ppo`'s. The advantages come from ``group_advantages(..., normalize=False)``.

    Args:
        max_length: the constant, the most tokens that an answer may have; None for T.
    """
    tokens = _tokens("dr_grpo", log_probs, old_log_probs, advantages, mask)
    rows, length = tokens.kept.shape
    length = bounded("dr_grpo", "max_length", length if max_length is None else max_length)
    return policy_gradient(
        tokens, tokens.log_ratio, lambda values, kept: values.sum() / (rows * length), clip=clip, **options
    )


@keywords_of(policy_gradient)
def gspo(log_probs, old_log_probs, advantages, mask, *, clip=(3e-4, 4e-4), **options):
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071, equations 5 to 7).

    As :func:`grpo`, with one ratio for all tokens of an answer: exp of the mean of their log-ratios. Arguments,
    returned values and errors are :func:`ppo`'s.
    """
    tokens = _tokens("gspo", log_probs, old_log_probs, advantages, mask)
    log_ratio = tokens.log_ratio.sum(1, keepdim=True) / tokens.kept.sum(1, keepdim=True).clamp(min=1)
    return policy_gradient(tokens, log_ratio, _over_sequences, clip=clip, **options)
