"""The calls that ``fastllm bench export`` writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..registry import Op, Sample
from . import cases


@dataclass(frozen=True)
class Exported:
    """One call of an op: its shape's name, as a Python name too, and what makes it on a device."""

    op: Op
    shape: str
    dtype: str
    make: Callable[[torch.device, torch.dtype], Sample]

    @property
    def identifier(self) -> str:
        return identifier(self.shape)

    def sample(self, device: torch.device) -> Sample:
        torch.manual_seed(0)
        return self.make(device, getattr(torch, self.dtype))


def identifier(shape: str) -> str:
    """A shape's name in small letters, digits and underscores."""
    return re.sub(r"\W+", "_", shape.lower()).strip("_")


def calls(ops: list[Op], dtype: str, device: torch.device, parts: list[str]) -> tuple[list[Exported], list[str]]:
    """The calls whose shapes' names contain one of ``parts``; and those that are left out, with the reason.

    On a CPU an op has the shapes for CPUs alone, where it has such.
    """
    found, left_out = [], []
    for op in ops:
        shapes: Mapping[str, Callable] = cases.shapes_of(op.name)
        if device.type == "cpu":
            shapes = cases.cpu_shapes_of(op.name) or shapes
        for shape, make in shapes.items():
            if not any(part in shape for part in parts):
                continue
            # Two draws of a mask are never equal.
            if make(torch.device("meta"), torch.float32).kwargs.get("dropout_p"):
                left_out.append(f"{op.name}, {shape}: it has dropout, and other benchmarks compare without a seed")
            else:
                found.append(Exported(op, shape, dtype, make))
    return found, left_out
