"""Dropout as a function of (seed, step, row, element), whatever the micro-batch and the number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.shared.philox import draw_seed


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele et al. 2014), in place; int64 products wrap and shifts are made logical."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def keep_mask(seed: torch.Tensor, rows: torch.Tensor, size: int, p: float) -> torch.Tensor:
    """(len(rows), size) bool, False with probability ``p`` in steps of 2^-16: element j of row r hashes (seed, r, j).

    Four elements share one 64-bit hash of a counter.
    """
    words = -(-size // 4)
    key = _mix(rows * -0x61C8864680B583EB + seed)
    # Odd strides of the counter, so that no two words of a row are the same.
    counter = key[:, None] + torch.arange(words, device=rows.device) * -0x61C8864680B583EB
    lanes = _mix(counter).view(torch.int16)[:, :size]
    return lanes >= round(p * 2**16) - 2**15


class RowDropout(nn.Dropout):
    """``torch.nn.Dropout`` whose mask is keyed by row: dimension 0 of the input runs over the sequences.

    Each call draws one seed from torch's generator, which the loop sets anew for every micro-batch of a step.

    Args:
        first_row: int64 scalar, how many rows of the whole batch come before the input's; shared by a model's modules.
    """

    def __init__(self, p: float, first_row: torch.Tensor):
        super().__init__(p)
        self.first_row = first_row

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        seed = draw_seed(input.device)
        rows = torch.arange(input.shape[0], device=input.device) + self.first_row.to(input.device)
        keep = keep_mask(seed, rows, input[0].numel(), self.p).view(input.shape)
        dropped = round(self.p * 2**16) / 2**16
        return input * (keep.to(input.dtype) / (1 - dropped))


def key_dropout(model: nn.Module) -> nn.Module:
    """Put a :class:`RowDropout` in the place of every ``torch.nn.Dropout`` of ``model``; they share one first row."""
    first_row = torch.zeros((), dtype=torch.int64)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, RowDropout(child.p, first_row))
    return model


def set_first_row(model: nn.Module, row: int) -> None:
    """Say which row of the whole batch is the first one of the micro-batch that ``model`` is given next."""
    for module in model.modules():
        if isinstance(module, RowDropout):
            module.first_row.fill_(row)
            return
