"""Losses over pairs of answers, or over single answers that are wanted or not, and the reward model's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..ops.shared.check import check_choice, check_length, check_number
from .checks import (
    as_float,
    bounded,
    check_place,
    check_real,
    check_tensor,
    readable,
    sequences,
    smoothing,
    wide,
    with_metrics,
)


def sequence_log_probs(log_probs, mask, *, average=False):
    """The log-probability of each answer: the sum over its tokens, or their mean.

    Args:
        log_probs: (B, T), floating point.
        mask: (B, T), boolean or numbers; tokens where it is not 0 are the answer's.
        average: return the mean over an answer's tokens, which ORPO and SimPO need.

    Returns:
        (B,), in at least fp32. Values where the mask is zero have no influence, not even NaN.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; on CPU, an answer is empty.
    """
    name = "sequence_log_probs"
    kept = token_mask(name, log_probs, mask)
    if readable(kept):
        empty = ~kept.any(-1)
        if empty.any():
            raise ValueError(f"{name}: the answer of row {int(empty.nonzero()[0])} is empty: its mask is 0 everywhere")
    total = torch.where(kept, wide(log_probs), 0.0).sum(-1)
    return total / kept.sum(-1) if average else total


def unpack(values, cu_seqlens, *, max_seqlen=None):
    """Packed rows ("padding-free") with one row for each sequence, as these losses need them.

    Args:
        values: (total,) or (1, total), such as log-probabilities, entropies or a mask of packed tokens.
        cu_seqlens: (B + 1,), int32 or int64: where each sequence begins, from 0, and then the total, as in
            :func:`fastllm.functional.attention`.
        max_seqlen: the length of the longest sequence; None reads it from ``cu_seqlens``, and then the host waits for a
            GPU.

    Returns:
        (B, max_seqlen), 0 after a sequence's end, and differentiable. A mask of ones unpacks to the mask of the present
        tokens.

    Raises:
        TypeError, ValueError: a shape, dtype or device does not fit; on CPU, ``cu_seqlens`` does not ascend from 0 to
            the total, or a sequence is longer than ``max_seqlen``.
    """
    name = "unpack"
    check_real(name, "values", values)
    if values.dim() not in (1, 2) or (values.dim() == 2 and len(values) != 1):
        raise ValueError(f"{name}: values must be a tensor of shape (total,) or (1, total), got {list(values.shape)}")
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name}: cu_seqlens must be int32 or int64, got {got}")
    check_real(name, "cu_seqlens", cu_seqlens)
    if max_seqlen is not None:
        check_length(name, "max_seqlen", max_seqlen)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"{name}: cu_seqlens must be of shape (B + 1,), got {list(cu_seqlens.shape)}")
    check_place(name, "cu_seqlens", cu_seqlens, values, cu_seqlens.shape)
    lengths, total = cu_seqlens.diff(), values.shape[-1]
    if readable(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != total or bool((lengths < 0).any())):
        raise ValueError(
            f"{name}: cu_seqlens must ascend from 0 to the {total} packed tokens, got {cu_seqlens.tolist()}"
        )
    if max_seqlen is None:
        max_seqlen = int(lengths.max())
    elif readable(cu_seqlens) and bool((lengths > max_seqlen).any()):
        raise ValueError(f"{name}: max_seqlen is {max_seqlen}, the longest sequence has {int(lengths.max())}")
    at = torch.arange(max_seqlen, device=values.device)
    there = at < lengths.unsqueeze(1)
    index = torch.where(there, cu_seqlens[:-1].unsqueeze(1) + at, 0)
    return torch.where(there, values.reshape(-1)[index] if total else values.new_zeros(index.shape), 0)


def token_mask(loss: str, log_probs, mask) -> torch.Tensor:
    """The mask as booleans, (B, T); both checked."""
    check_tensor(loss, "log_probs", log_probs)
    if log_probs.dim() != 2:
        raise ValueError(f"{loss}: log_probs must be of shape (B, T), a number a token, got {list(log_probs.shape)}")
    check_real(loss, "mask", mask)
    check_place(loss, "mask", mask, log_probs, log_probs.shape)
    return mask != 0


def _pairs(chosen, rejected, margins) -> dict[str, torch.Tensor]:
    """What is logged of pairs, of their rewards and the differences."""
    return {
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "margin": margins.mean(),
        "accuracy": (margins > 0).to(margins.dtype).mean(),
    }


def _logistic(margins, label_smoothing: float):
    """-log sigmoid of the margins, where a share of the labels may be turned round."""
    loss = -F.logsigmoid(margins)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)
    return loss


def dpo(
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta=0.1, kind="sigmoid",
    label_smoothing=0.0, return_metrics=False,
):  # fmt: skip
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7), and two related losses.

    With h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected), a pair's loss is

    - "sigmoid": -log sigmoid(beta h); with label_smoothing e, the probability that the two answers are swapped, it is
      -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (conservative DPO, Mitchell 2023);
    - "hinge": max(0, 1 - beta h) (Zhao et al. 2023, SLiC-HF, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657);
    - "ipo": (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17).

    Args:
        policy_chosen, policy_rejected: the summed log-probabilities (B,) of the answers, which get a gradient.
        reference_chosen, reference_rejected: those of the reference model. TRL passes means over tokens to "ipo"; the
            paper has sums.
        beta: positive; the strength of the pull toward the reference.

    Returns:
        The mean loss. Metrics: chosen_reward and rejected_reward, beta times the difference of policy and reference;
        margin, the difference of the two; accuracy, the share of pairs whose margin is positive.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit.
    """
    chosen, rejected, of_chosen, of_rejected = sequences(
        "dpo", policy_chosen=policy_chosen, policy_rejected=policy_rejected, reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )  # fmt: skip
    beta = bounded("dpo", "beta", beta)
    check_choice("dpo", "kind", kind, ("sigmoid", "hinge", "ipo"))
    label_smoothing = smoothing("dpo", label_smoothing)
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"dpo: label_smoothing is for kind 'sigmoid', got kind {kind!r}")
    good, bad = chosen - of_chosen, rejected - of_rejected
    h = good - bad
    if kind == "sigmoid":
        loss = _logistic(beta * h, label_smoothing)
    else:
        loss = torch.relu(1 - beta * h) if kind == "hinge" else (h - 1 / (2 * beta)).square()
    return with_metrics(loss.mean(), _pairs(beta * good, beta * bad, beta * h), return_metrics)


def cpo(
    policy_chosen, policy_rejected, *, beta=0.1, kind="sigmoid", nll=None, nll_weight=1.0, label_smoothing=0.0,
    return_metrics=False,
):  # fmt: skip
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, equation 5): DPO without a reference.

    A pair's loss is -log sigmoid(beta (policy_chosen - policy_rejected)) + nll_weight * nll.

    Args:
        policy_chosen, policy_rejected: the summed log-probabilities (B,) of the answers.
        kind: "sigmoid", or "hinge" and "ipo" as in :func:`dpo`.
        nll: the loss of the chosen answers, a scalar or (B,); None for -policy_chosen, as in the paper. TRL takes
            the mean over the tokens.

    Returns:
        The mean loss. Metrics: as :func:`dpo`'s, of beta times the log-probabilities, and nll.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit.
    """
    chosen, rejected = sequences("cpo", policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    nll_weight = bounded("cpo", "nll_weight", nll_weight, open_end=False)
    beta = bounded("cpo", "beta", beta)
    check_choice("cpo", "kind", kind, ("sigmoid", "hinge", "ipo"))
    zero = torch.zeros_like(chosen)
    loss = dpo(chosen, rejected, zero, zero, beta=beta, kind=kind, label_smoothing=label_smoothing)
    nll = _mean_nll("cpo", chosen, nll)
    margins = beta * (chosen - rejected)
    metrics = {**_pairs(beta * chosen, beta * rejected, margins), "nll": nll}
    return with_metrics(loss + nll_weight * nll, metrics, return_metrics)


def _mean_nll(loss: str, chosen, nll):
    if nll is None:
        return -chosen.mean()
    check_tensor(loss, "nll", nll, chosen)
    if nll.dim() and nll.shape != chosen.shape:
        raise ValueError(f"{loss}: nll must be a scalar or of shape {list(chosen.shape)}, got {list(nll.shape)}")
    return wide(nll).mean()


def _log_odds(log_p):
    """log(p / (1 - p)) of log-probabilities; those within eps of 0 count as -eps, where the odds are not infinite."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    # Either form loses digits on the other's side of -log 2 (Maechler 2012, "Accurately Computing log(1 - exp(-|a|))").
    return log_p - torch.where(log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


def orpo(policy_chosen, policy_rejected, *, beta=0.1, nll=None, return_metrics=False):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7).

    A pair's loss is nll - beta log sigmoid(log odds(chosen) - log odds(rejected)) with odds(p) = p / (1 - p) of the
    answers' mean probability a token.

    Args:
        policy_chosen, policy_rejected: the log-probabilities (B,) of the answers, means over their tokens.
        beta: the paper's lambda, positive.
        nll: the loss of the chosen answers, a scalar or (B,); None for -policy_chosen, as in the paper.

    Returns:
        The mean loss. Metrics: as :func:`dpo`'s, of beta times the log-probabilities; nll; log_odds_ratio.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit; on CPU, a log-probability is above 0.
    """
    chosen, rejected = sequences("orpo", policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    beta = bounded("orpo", "beta", beta)
    for name, log_p in (("policy_chosen", chosen), ("policy_rejected", rejected)):
        if readable(log_p) and bool((log_p > 0).any()):
            raise ValueError(f"orpo: {name} must hold log-probabilities, got one above 0, {log_p.max().item()}")
    ratio = _log_odds(chosen) - _log_odds(rejected)
    nll = _mean_nll("orpo", chosen, nll)
    loss = nll - beta * F.logsigmoid(ratio).mean()
    pairs = _pairs(beta * chosen, beta * rejected, beta * (chosen - rejected))
    return with_metrics(loss, {**pairs, "nll": nll, "log_odds_ratio": ratio.mean()}, return_metrics)


def simpo(policy_chosen, policy_rejected, *, beta=2.0, gamma=1.0, label_smoothing=0.0, return_metrics=False):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6), without a reference.

    A pair's loss is -log sigmoid(beta (policy_chosen - policy_rejected) - gamma).

    Args:
        policy_chosen, policy_rejected: the log-probabilities (B,) of the answers, means over their tokens.
        beta: positive.
        gamma: the margin that a pair should have, at least 0.
        label_smoothing: as in :func:`dpo`.

    Returns:
        The mean loss. Metrics: as :func:`dpo`'s, of beta times the log-probabilities.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit.
    """
    chosen, rejected = sequences("simpo", policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    beta = bounded("simpo", "beta", beta)
    gamma = bounded("simpo", "gamma", gamma, open_end=False)
    label_smoothing = smoothing("simpo", label_smoothing)
    margins = beta * (chosen - rejected)
    loss = _logistic(margins - gamma, label_smoothing).mean()
    return with_metrics(loss, _pairs(beta * chosen, beta * rejected, margins), return_metrics)


def kto(
    policy, reference, desirable, *, kl=0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
    return_metrics=False,
):  # fmt: skip
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8), for answers without pairs.

    With r = policy - reference, the loss of a desirable answer is desirable_weight (1 - sigmoid(beta (r - z))), of
    another one undesirable_weight (1 - sigmoid(beta (z - r))), where z = max(0, kl).

    Args:
        policy, reference: the summed log-probabilities (B,) of the answers.
        desirable: (B,), boolean.
        kl: the policy's divergence from the reference: a number or a scalar tensor, which gets no gradient. The paper
            takes the mean of r over answers that are paired with other prompts of the batch; 0 leaves it out.

    Returns:
        The mean loss. Metrics: chosen_reward and rejected_reward, the means of beta r over the desirable answers and
        over the others (NaN without any); margin, their difference; kl.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit.
    """
    policy, reference = sequences("kto", policy=policy, reference=reference)
    beta = bounded("kto", "beta", beta)
    desirable_weight = bounded("kto", "desirable_weight", desirable_weight, open_end=False)
    undesirable_weight = bounded("kto", "undesirable_weight", undesirable_weight, open_end=False)
    if not isinstance(desirable, torch.Tensor) or desirable.dtype != torch.bool:
        got = desirable.dtype if isinstance(desirable, torch.Tensor) else type(desirable).__name__
        raise TypeError(f"kto: desirable must be a boolean tensor, got {got}")
    check_place("kto", "desirable", desirable, policy, policy.shape)
    if isinstance(kl, torch.Tensor):
        check_real("kto", "kl", kl)
    else:
        check_number("kto", "kl", kl)
        if not -math.inf < kl < math.inf:
            raise ValueError(f"kto: kl must be finite, got {kl}")
        kl = as_float(kl)
    z = torch.as_tensor(kl, dtype=policy.dtype, device=policy.device).detach().clamp(min=0)
    if z.dim():
        raise ValueError(f"kto: kl must be a number or a scalar, got shape {list(z.shape)}")
    r = policy - reference
    is_good = desirable.to(r.dtype)
    weight = desirable_weight * is_good + undesirable_weight * (1 - is_good)
    loss = weight * (1 - torch.sigmoid(beta * (2 * is_good - 1) * (r - z)))
    good, bad = (torch.where(which, beta * r, 0).sum() / which.sum() for which in (desirable, ~desirable))
    metrics = {"chosen_reward": good, "rejected_reward": bad, "margin": good - bad, "kl": z}
    return with_metrics(loss.mean(), metrics, return_metrics)


def reward_model(chosen, rejected, *, margin=None, center=0.0, return_metrics=False):
    """The Bradley-Terry loss of a reward model (Ouyang et al. 2022, arXiv:2203.02155, equation 1).

    A pair's loss is -log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2.

    Args:
        chosen, rejected: the model's rewards (B,).
        margin: (B,), how much better the chosen one is (Touvron et al. 2023, arXiv:2307.09288, equation 2), or None for
            0.
        center: at least 0; pulls the rewards toward a mean of 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Returns:
        The mean loss. Metrics: chosen_reward, rejected_reward, margin and accuracy, as :func:`dpo`'s.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option does not fit.
    """
    chosen, rejected = sequences("reward_model", chosen=chosen, rejected=rejected)
    center = bounded("reward_model", "center", center, open_end=False)
    difference = chosen - rejected
    if margin is not None:
        check_tensor("reward_model", "margin", margin, chosen, chosen.shape)
    loss = -F.logsigmoid(difference if margin is None else difference - margin)
    if center:
        loss = loss + center * (chosen + rejected).square()
    return with_metrics(loss.mean(), _pairs(chosen, rejected, difference), return_metrics)
