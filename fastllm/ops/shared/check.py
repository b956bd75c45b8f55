"""Checks of arguments that ops share; each error names op and argument."""

from __future__ import annotations

import torch


def check_floating(op: str, name: str, tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")


def check_integer(op: str, name: str, value) -> None:
    # Symbolic integers pass: they are no ints.
    if isinstance(value, float | str | torch.Tensor):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
