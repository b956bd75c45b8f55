"""Shapes and rivals of linear_kl_div: heads of real models, a frozen teacher of twice the width."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ..registry import Sample
from .linear_cross_entropy import SHAPES


def _call(name, rows, hidden, classes, device, dtype) -> Sample:
    def make(n, width, scale=1.0):
        return (torch.randn(n, width, device=device) * scale).to(dtype)

    student = make(rows, hidden).requires_grad_(), make(classes, hidden, hidden**-0.5).requires_grad_()
    return Sample(name, (*student, make(rows, 2 * hidden), make(classes, 2 * hidden, (2 * hidden) ** -0.5)))


shapes = {name: partial(_call, name, *shape) for name, shape in SHAPES.items() if not name.startswith("Gemma")}
cpu_shapes = {"GPT-2 512x768x50304": partial(_call, "", 512, 768, 50304)}


def _all_logits():
    """As trainers do without a fused op: the logits of both, and torch's KL divergence of their log-softmax."""

    def linear_kl_div(input, linear_weight, teacher_input, teacher_weight):
        log_q = F.log_softmax((input @ linear_weight.t()).float(), -1)
        log_p = F.log_softmax((teacher_input @ teacher_weight.t()).float(), -1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return linear_kl_div


rivals = {"all the logits": _all_logits}
