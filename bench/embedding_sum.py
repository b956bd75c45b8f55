"""Shapes of embedding_sum: token, position and segment tables."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..registry import Sample
from .embedding import zipf_ids


class SumShape(NamedTuple):
    batch: int
    length: int
    tables: tuple[int, ...]  # rows in each table
    columns: int


# The most telling first.
_CALLS = {
    "GPT-2 32x1024, 50304+1024 x768": SumShape(32, 1024, (50304, 1024), 768),
    "BERT-base 32x512, 30522+512+2 x768": SumShape(32, 512, (30522, 512, 2), 768),
    "one token, 50304+1024 x768": SumShape(1, 1, (50304, 1024), 768),
}


def _call(name, shape: SumShape, device, dtype) -> Sample:
    batch, length, tables, columns = shape
    tokens = zipf_ids(batch * length, tables[0], device).view(batch, length)
    positions = torch.arange(length, device=device).expand(batch, length)
    segments = (positions >= length // 2).long()
    weights = tuple(torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_() for rows in tables)
    return Sample(name, ((tokens, positions, segments)[: len(tables)], weights))


shapes = {name: partial(_call, name, call) for name, call in _CALLS.items()}
cpu_shapes = {"GPT-2 4x1024, 50304+1024 x768": partial(_call, "", SumShape(4, 1024, (50304, 1024), 768))}
