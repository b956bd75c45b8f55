"""The interface of an objective.

An objective holds the data and no cursor. A batch is a dict of tensors whose first dimension is the sequence, so that
any rows of it are a smaller batch: that is how a step is cut into micro-batches, or over several machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from ..evaluate import Evaluation

Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """What the loop asks of an objective.

    A step minimises the sum of :meth:`losses`, each a mean over as many targets as :meth:`counts` says under the same
    name. A part of a batch therefore weighs ``counts(part) / counts(batch)``, term by term.
    """

    def batch(self, step: int) -> Batch:
        """The batch of ``step`` in host memory: a function of (data, seed, step) alone. No global generator is used."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many targets each term's mean is over. ``batch`` is in host memory."""

    def tokens(self, batch: Batch) -> int:
        """How many tokens the model reads in ``batch``, padding not counted."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms, each the mean over its targets (scalars, fp32), differentiable; ``batch`` on the model's device.

        A term without targets in this batch may be anything; it is not used.
        """

    def evaluate(self, model: nn.Module, rows: int, dtype: str, limit: int) -> Evaluation:
        """The score on held-out data, ``rows`` sequences at a time, on at most ``limit`` of them (0: on all).

        Draws no random number from torch's generators and leaves the model as it was.
        """


def rows_of(batch: Batch, rows: int) -> list[Batch]:
    """``batch`` in parts of ``rows`` sequences."""
    names, columns = list(batch), [tensor.split(rows) for tensor in batch.values()]
    return [dict(zip(names, part, strict=True)) for part in zip(*columns, strict=True)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
