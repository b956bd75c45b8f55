"""The exponential moving average of a run's weights, beside the weights that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

# What a checkpoint calls the weights that are trained; its model has the average.
TRAINED = "weights"


class WeightAverage:
    """average <- d * average + (1 - d) * weights after each step; d is ``decay``, less in the first steps.

    With ``t`` steps made before, d is at most (1 + t) / (10 + t), so that the first weights are soon forgotten (as
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``).

    Args:
        decay: 0: there is no average, and nothing here does anything.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        averaged = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self._parameters = averaged
        # The averages; within ``applied`` the weights that are trained.
        self._others = {name: p.detach().clone() for name, p in averaged.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Add the current weights to the average; ``steps`` were made before this one."""
        weight = 1.0 - min(self._decay, (1 + steps) / (10 + steps))
        for name, p in self._parameters.items():
            self._others[name].lerp_(p.detach(), weight)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._parameters.items():
            held = p.detach().clone()
            p.copy_(self._others[name])
            self._others[name].copy_(held)

    @contextlib.contextmanager
    def applied(self) -> Iterator[dict[str, torch.Tensor]]:
        """Within the block the model has the average; gives the trained weights as a checkpoint names them."""
        self._exchange()
        try:
            yield {f"{name}:{TRAINED}": tensor for name, tensor in self._others.items()}
        finally:
            self._exchange()

    def take(self) -> None:
        """Leave the average in the model: training is over."""
        if self._parameters:
            self._exchange()
        self._parameters, self._others = {}, {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Go on from a checkpoint whose model, with the average, has been loaded; returns what else ``tensors`` has.

        Raises:
            ValueError: the trained weights are not all there, or not of the model's shapes.
        """
        for name, p in self._parameters.items():
            trained = tensors.get(f"{name}:{TRAINED}")
            if trained is None or trained.shape != p.shape:
                found = "missing" if trained is None else f"of shape {tuple(trained.shape)}, not {tuple(p.shape)}"
                raise ValueError(f"trained weights of {name}: {found}")
        for name, p in self._parameters.items():
            self._others[name].copy_(p)
            p.copy_(tensors[f"{name}:{TRAINED}"])
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(f":{TRAINED}")}
