"""Dropout as a function of (seed, step, row, element), whatever the micro-batch and the number of ranks.

A step's seed starts PyTorch's generator anew for every micro-batch, so each call of a pass draws the key that it draws
in every other. Its masks have rows (:mod:`fastllm.ops.shared.philox`), counted from the micro-batch's first sequence in
the whole batch: every module that drops out has that as ``first_row``, one tensor for a model.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops.shared.dropout import dropout
from ..ops.shared.philox import draw_seed, first_row_of


class RowDropout(nn.Dropout):
    """``torch.nn.Dropout`` whose mask is keyed by row: dimension 0 of the input runs over the sequences.

    Args:
        p: probability in [0, 1] of dropping an element.
        first_row: int64 scalar, how many sequences of the whole batch come before the input's.
    """

    def __init__(self, p: float, first_row: torch.Tensor):
        super().__init__(p)
        self.first_row = first_row

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        rows = input if input.dim() > 1 else input.unsqueeze(-1)
        seed = draw_seed(input.device, first_row_of(rows.shape[:-1], self.first_row))
        return dropout(rows, seed, self.p).view(input.shape)


def key_dropout(model: nn.Module) -> nn.Module:
    """Have every module of ``model`` that drops out count rows from one first row; ``torch.nn.Dropout`` is replaced."""
    device = next((p.device for p in model.parameters()), None)
    first_row = torch.zeros((), dtype=torch.int64, device=device)
    for module in list(model.modules()):
        if hasattr(module, "first_row"):
            module.first_row = first_row
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, RowDropout(child.p, first_row))
    return model


def set_first_row(model: nn.Module, row: int) -> None:
    """Say which row of the whole batch is the first one of the micro-batch that ``model`` is given next."""
    for module in model.modules():
        first_row = getattr(module, "first_row", None)
        if first_row is not None:
            first_row.fill_(row)
            return
