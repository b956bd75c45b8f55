"""Checks of arguments that ops share; each error names op and argument."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...backends import KERNEL_DTYPES

_IN_FLOAT32 = "the extension computes in float32, for float32, float16 and bfloat16"


def check_floating(op: str, name: str, tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")


def beyond_float32(tensors: Iterable[torch.Tensor | None]) -> str | None:
    """Why the extension's code that computes in float32 cannot take ``tensors``, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return _IN_FLOAT32
    return None


def check_number(op: str, name: str, value) -> None:
    # Symbolic numbers pass: they are no floats.
    if value is None or isinstance(value, str | torch.Tensor | tuple | list | dict):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_integer(op: str, name: str, value) -> None:
    # Symbolic integers pass: they are no ints.
    if value is None or isinstance(value, float | str | torch.Tensor | tuple | list | dict):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
