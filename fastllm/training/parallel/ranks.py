"""The processes that train one model together, as a step sees them; here the one process that trains alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from ...data import Tokenizer
from ..checkpoints.checkpoint import SHARDED, Keep, load_checkpoint
from ..checkpoints.saving import Saver
from ..objective import Batch, Objective, row_count, rows_of

Losses = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def shares(
    losses: Losses, model: nn.Module, batch: Batch, weights: Mapping[str, float], elsewhere: Batch | None
) -> dict[str, torch.Tensor]:
    """The terms that have a weight, times it; with a batch ``elsewhere``, a zero that depends on every term."""
    result: dict[str, torch.Tensor] = {}
    if weights:
        means = losses(model, batch)
        result = {name: means[name] * weight for name, weight in weights.items()}
    if elsewhere is not None:
        result["elsewhere"] = 0.0 * torch.stack([*losses(model, elsewhere).values()]).sum()
    return result


class Ranks:
    """What a step needs of the other processes. This class: there are none.

    Of ``size`` ranks this one is number ``rank``. They see ``parts`` different parts of a batch, this one number
    ``part``. An exchange of gradients leaves the mean of ``averaged`` ranks' in each; 1: it leaves their sum.
    """

    rank, size = 0, 1
    part, parts = 0, 1
    averaged = 1

    def device(self, device: torch.device) -> torch.device:
        """The one of that kind of device that this rank works on."""
        return device

    def describe(self) -> str:
        """What follows the model's description, for people."""
        return ""

    def dtype(self, dtype: str) -> str:
        """What "auto" comes to where it is not measured."""
        return dtype

    def first(self) -> AbstractContextManager:
        """Around what the first rank does before the others."""
        return contextlib.nullcontext()

    def build(self, make: Callable[[], nn.Module], device: torch.device, dtype: str) -> nn.Module:
        """The new model on ``device``, to be trained in ``dtype``; torch's generator is seeded."""
        return make().to(device)

    def copy(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
        """Fill ``parameter`` of a model that was built here with this rank's part of ``whole``."""
        parameter.copy_(whole)

    def load(
        self, checkpoint: Path, make: Callable[[], nn.Module], device: torch.device, dtype: str
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The model and the optimisers' tensors of a checkpoint.

        Args:
            make: gives a new model of the checkpoint's kind.

        Raises:
            InputError: a file is not what it should be, although its hash is.
        """
        if (checkpoint / SHARDED).exists():
            from ..checkpoints.sharded import load_whole

            return load_whole(checkpoint, make, device)
        model, tensors, _ = load_checkpoint(checkpoint, device)
        return model, tensors

    def attach(self, model: nn.Module, objective: Objective) -> None:
        """Make ready to train ``model``."""

    def evaluating(self) -> AbstractContextManager:
        """Around an evaluation."""
        return contextlib.nullcontext()

    def whole(self, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module | None:
        """The model with all of its weights, on the first rank; called by every rank."""
        return model if self.rank == 0 else None

    def saver(
        self, folder: Path, model: nn.Module, tokenizer: Tokenizer, keep: Keep, tell: Callable[[str], None]
    ) -> Saver:
        """What writes the run's checkpoints."""
        return Saver(folder, model, tokenizer, keep, tell)

    def beat(self, step: int, phase: str) -> None:
        """Say where this rank is, for the others to know if it should hang."""

    def mine(self, batch: Batch) -> tuple[Batch, int]:
        """This rank's rows of ``batch``, and the number of its first row."""
        rows = row_count(batch) // self.parts
        first = self.part * rows
        return {name: tensor[first : first + rows] for name, tensor in batch.items()}, first

    def stand_in(self, objective: Objective, batch: Batch, rows: int) -> Batch:
        """The part of the whole batch that has targets for the most terms."""
        return max(rows_of(batch, rows), key=lambda part: sum(map(bool, objective.counts(part).values())))

    def shares(
        self, losses: Losses, model: nn.Module, batch: Batch, weights: Mapping[str, float], elsewhere: Batch | None
    ) -> dict[str, torch.Tensor]:
        """As the function of this name."""
        return shares(losses, model, batch, weights, elsewhere)

    def exchange(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a part: gradients are exchanged within the ``last`` one of a step only."""
        return contextlib.nullcontext()

    def sum_(self, values: Sequence[torch.Tensor]) -> None:
        """Add up each of the scalars over the ranks, in place."""

    def clip(self, model: nn.Module, largest: float) -> torch.Tensor:
        """Scale the gradient to a global norm of at most ``largest``; returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's ``values``, by rank."""
        return [list(values)]


ALONE = Ranks()
