"""The interface of an objective.

An objective holds the data and no cursor. A batch is a dict of tensors whose first dimension is the sequence, so that
any rows of it are a smaller batch: that is how a step is cut into micro-batches, or over several machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from ..data.batches import IGNORE

Batch = dict[str, torch.Tensor]
# Endings of the names of those scores for which less is better.
LESS = ("bits_per_byte", "perplexity", "loss")
# What follows a score's number in place of its name.
UNITS = {"bits_per_byte": "bits/byte"}


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over the ``tokens`` (or other targets) scored; ``scores`` by name; ``main`` is the one to show.

    For language models ``main`` is ``bits_per_byte``. ``whole``: all held-out data were scored.
    """

    loss: float
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    main: str = "bits_per_byte"
    whole: bool = True

    @property
    def bits_per_byte(self) -> float | None:
        return self.scores.get("bits_per_byte")

    @property
    def signed_score(self) -> float:
        """The main score, negated if lower is better, so that higher is always better."""
        score = self.scores[self.main]
        return -score if self.main.endswith(LESS) else score

    def describe(self) -> str:
        """All scores, in one line."""
        if self.bits_per_byte is not None:
            return f"{self.bits_per_byte:.4f} bits per byte ({self.loss:.4f} nats per token, {self.tokens:,} tokens)"
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.scores.items())
        return f"{scores} (loss {self.loss:.4f} over {self.tokens:,} targets)"

    def headline(self) -> str:
        """The main score, for people."""
        return f"{self.scores[self.main]:.3f} {UNITS.get(self.main, self.main)}"


# A model as the loop has it: one of fastllm.models', or that as DDP, FSDP2 or peft have changed it. Those hand on
# attributes that no type knows of.
TrainedModel: TypeAlias = Any


class Objective(Protocol):
    """What the loop asks of an objective.

    A step minimises the sum of :meth:`losses`, each a mean over as many targets as :meth:`counts` says under the same
    name. A part of a batch therefore weighs ``counts(part) / counts(batch)``, term by term.
    """

    def batch(self, step: int, done: float = 1.0) -> Batch:
        """The batch of ``step``, when the part ``done`` of the run is over, in host memory.

        A function of (data, seed, step, done) alone. No global generator is used.
        """
        ...

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many targets each term's mean is over. ``batch`` is in host memory."""
        ...

    def tokens(self, batch: Batch) -> int:
        """How many tokens the model reads in ``batch``, padding not counted."""
        ...

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms, each the mean over its targets (scalars, fp32), differentiable; ``batch`` of :func:`to_device`.

        A term without targets in this batch may be anything; it is not used.
        """
        ...

    def evaluate(self, model: TrainedModel, rows: int, dtype: str, limit: int) -> Evaluation:
        """The score on held-out data, ``rows`` sequences at a time, on at most ``limit`` of them (0: on all).

        Draws no random number from torch's generators and leaves the model as it was.
        """
        ...


def row_count(batch: Batch) -> int:
    """The number of sequences in ``batch``."""
    return len(next(iter(batch.values())))


def target_count(batch: Batch) -> int:
    """How many of the ``targets`` of ``batch`` (in host memory) are not ignored."""
    return int((batch["targets"] != IGNORE).sum())


def rows_of(batch: Batch, rows: int) -> list[Batch]:
    """``batch`` in parts of ``rows`` sequences."""
    names, columns = list(batch), [tensor.split(rows) for tensor in batch.values()]
    return [dict(zip(names, part, strict=True)) for part in zip(*columns, strict=True)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``, but for ``lengths``, which stay in host memory: an encoder asks for their values.

    The host does not wait for what a GPU has still to do, such as the micro-batch before this one: it would for a copy
    from memory that is not pinned.
    """
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() if tensor.is_cpu else tensor for name, tensor in batch.items()}
    return {
        name: tensor if name == "lengths" else tensor.to(device, non_blocking=device.type == "cuda")
        for name, tensor in batch.items()
    }
