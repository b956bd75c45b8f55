"""A student that learns from a text and from what a teacher expects of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...data import Dataset, TokenFile, evaluation_batches
from ..device import autocast
from ..evaluate import Evaluation, bits_per_byte, evaluating, total
from ..objective import Batch, TrainedModel, target_count, to_device
from .streams import CausalLM


class TeacherTerm(NamedTuple):
    """What is minimised beside the text's loss: ``share`` of the whole is the teacher's, see linear_kl_div."""

    share: float
    direction: str
    temperature: float
    beta: float


def teacher_divergence(model: TrainedModel, hidden: torch.Tensor, teacher: TrainedModel, batch: Batch, **options):
    """The divergence of ``model`` from ``teacher`` where ``batch`` has targets, a scalar; see linear_kl_div.

    ``hidden``: the model's states of the batch's tokens. The teacher gets no gradient.
    """
    with torch.no_grad():
        expected = teacher.hidden(batch["tokens"])
    scale, of_teacher = model.config.logit_scale, teacher.config.logit_scale
    return model.head.divergence(
        hidden if scale == 1.0 else hidden * scale, expected if of_teacher == 1.0 else expected * of_teacher,
        teacher.head.weight.detach(), batch["targets"], **options,
    )  # fmt: skip


def student_scores(
    student: TrainedModel, teacher: TrainedModel, tokens: TokenFile, context_length: int, rows: int, *,
    dtype: str = "float32", limit: int = 0,
) -> Evaluation:  # fmt: skip
    """The student's bits per byte of ``tokens`` in the windows of :func:`fastllm.training.evaluate`.

    And ``kl_to_teacher``: the mean of KL(teacher || student) at temperature 1, in nats a token.
    """
    device = next(student.parameters()).device
    stride, losses, divergences = max(1, context_length // 2), [], []
    with evaluating(student):
        for inputs, targets in evaluation_batches(tokens.tokens, context_length, stride, rows, limit):
            batch = {"tokens": inputs, "targets": targets}
            scored = target_count(batch)
            batch = to_device(batch, device)
            with autocast(device, dtype):
                hidden = student.hidden(batch["tokens"])
                loss = student.head.loss(hidden, batch["targets"], student.config.logit_scale)
                kl = teacher_divergence(student, hidden, teacher, batch)
            losses.append((loss, scored))
            divergences.append((kl, scored))
    nats, divergence, count = total(losses), total(divergences), sum(scored for _, scored in losses)
    scores = {"bits_per_byte": bits_per_byte(nats / count, tokens), "kl_to_teacher": divergence / count}
    return Evaluation(nats / count, count, scores, whole=count == len(tokens) - 1)


class Distill(CausalLM):
    """The next token, and a teacher's distribution of it. A batch is :class:`CausalLM`'s.

    Terms: ``text``, the loss of the tokens times one less the teacher's share, and ``teacher``, the divergence times
    that share (Hinton et al. 2015).

    Args:
        teacher: a language model with the student's vocabulary; it is not trained.
    """

    def __init__(self, dataset: Dataset, context_length: int, batch_size: int, seed: int, *, teacher: TrainedModel,
                 divergence: TeacherTerm):  # fmt: skip
        super().__init__(dataset, context_length, batch_size, seed)
        self.teacher, self.divergence = teacher.eval().requires_grad_(False), divergence

    def counts(self, batch: Batch) -> dict[str, int]:
        targets = target_count(batch)
        return {"text": targets, "teacher": targets} if self.divergence.share < 1 else {"teacher": targets}

    def _teacher(self, device: torch.device) -> nn.Module:
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        return self.teacher

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        share, direction, temperature, beta = self.divergence
        teacher = self._teacher(batch["tokens"].device)
        hidden = model.hidden(batch["tokens"])
        kl = teacher_divergence(
            model, hidden, teacher, batch, direction=direction, temperature=temperature, beta=beta
        )  # fmt: skip
        terms = {"teacher": share * kl}
        if share < 1:
            terms["text"] = (1 - share) * model.head.loss(hidden, batch["targets"], model.config.logit_scale)
        return terms

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        teacher = self._teacher(next(model.parameters()).device)
        return student_scores(
            model, teacher, self.dataset.validation, self.context_length, rows, dtype=dtype, limit=limit
        )
