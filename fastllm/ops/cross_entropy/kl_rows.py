"""The divergences of two rows of logits and their gradients, and the definition that PyTorch differentiates.

With p the teacher's distribution and q the student's: forward KL(p || q), reverse KL(q || p), and the generalised
Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2024,
arXiv:2306.13649, equation 1). By the logits of q, KL(p || q) has the slope q - p and KL(q || r) the slope
q (log(q / r) - KL(q || r)). That m depends on q adds nothing: its shares in the two terms cancel.
"""

from __future__ import annotations

import torch

from ..shared.sharded import log_softmax
from .kl_call import Divergence, LinearKLDivCall
from .linear_reference import whole_logits


def log_softmax_of(z: torch.Tensor, softcap: float | None, temperature: float):
    """(log-softmax of the logits ``z``, soft-capped and divided by the temperature; the cap's slope or None)."""
    slope = None
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z, slope = softcap * bent, 1 - bent.square()
    return log_softmax(z if temperature == 1.0 else z / temperature, -1), slope


def dense(probabilities: torch.Tensor, indices: torch.Tensor, n_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """The logarithms (rows, V) of probabilities (rows, k) of the classes ``indices``; the other classes have none."""
    p = torch.zeros(len(probabilities), n_classes, dtype=dtype, device=probabilities.device)
    return p.scatter_add_(1, indices.long(), probabilities.to(dtype)).log_()


def _mixture(p, q, beta: float):
    """log(beta p + (1 - beta) q), finite where p and q are 0 or underflow in the sum."""
    return (beta * p + (1 - beta) * q).clamp(min=torch.finfo(p.dtype).tiny).log()


def _relative(p, log_p, log_q):
    """(KL(p || q) of each row, log p - log q where p is not 0, else 0)."""
    none = p == 0
    difference = torch.where(none, 0, torch.where(none, 0, log_p) - torch.where(none, 0, log_q))
    return (p * difference).sum(-1), difference


def divergence_of(log_p, log_q, divergence: Divergence) -> torch.Tensor:
    """A value a row, by differentiable operators."""
    p, q = log_p.exp(), log_q.exp()
    if divergence.direction == "forward":
        return _relative(p, log_p, log_q)[0]
    if divergence.direction == "reverse":
        return _relative(q, log_q, log_p)[0]
    log_m, beta = _mixture(p, q, divergence.beta), divergence.beta
    return beta * _relative(p, log_p, log_m)[0] + (1 - beta) * _relative(q, log_q, log_m)[0]


def divergence_and_slopes(log_p, log_q, divergence: Divergence, needs: tuple[bool, bool]):
    """(a value a row, its slopes by q's logits and by p's); a slope is None where ``needs`` does not ask."""
    need_q, need_p = needs
    p, q = log_p.exp(), log_q.exp()

    def own(a, difference, value):
        return difference.sub_(value.unsqueeze(-1)).mul_(a)

    if divergence.direction == "forward":
        value, difference = _relative(p, log_p, log_q)
        by_q = (q * p.sum(-1, keepdim=True)).sub_(p) if need_q else None
        return value, by_q, own(p, difference, value) if need_p else None
    if divergence.direction == "reverse":
        value, difference = _relative(q, log_q, log_p)
        by_p = p - q if need_p else None
        return value, own(q, difference, value) if need_q else None, by_p
    beta, log_m = divergence.beta, _mixture(p, q, divergence.beta)
    of_p, from_p = _relative(p, log_p, log_m)
    of_q, from_q = _relative(q, log_q, log_m)
    return (
        beta * of_p + (1 - beta) * of_q,
        own(q, from_q, of_q).mul_(1 - beta) if need_q else None,
        own(p, from_p, of_p).mul_(beta) if need_p else None,
    )


def kept_positions(call: LinearKLDivCall):
    """Which rows count, or None for all."""
    return None if call.target is None else call.target != call.divergence.ignore_index


def count_of(call: LinearKLDivCall, kept):
    """What a mean divides by, 1 for the other reductions. ``kept``: :func:`kept_positions`, whose count is a tensor."""
    if call.divergence.reduction != "mean":
        return 1
    return call.n_rows if kept is None else kept.sum().to(call.wide)


def linear_kl_div_definition(call: LinearKLDivCall):
    """The loss with all the logits, in at least fp32: a scalar, or the positions' shape for "none"."""
    how, wide = call.divergence, call.wide
    log_q, _ = log_softmax_of(
        whole_logits(call.input, call.linear_weight, call.linear_bias, wide), how.softcap, how.temperature
    )
    if call.teacher_indices is not None:
        k, v = call.teacher_input.shape[-1], log_q.shape[-1]
        log_p = dense(call.teacher_input.reshape(-1, k), call.teacher_indices.reshape(-1, k), v, wide).view_as(log_q)
    else:
        z = call.teacher_input.to(wide)
        if call.teacher_weight is not None:
            z = whole_logits(z, call.teacher_weight, call.teacher_bias, wide)
        log_p, _ = log_softmax_of(z, how.teacher_softcap, how.temperature)
    rows = how.temperature**2 * divergence_of(log_p, log_q, how)
    kept = kept_positions(call)
    rows = rows if kept is None else torch.where(kept, rows, 0.0)
    return rows if how.reduction == "none" else rows.sum() / count_of(call, kept)
