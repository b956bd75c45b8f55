"""Checks of arguments that ops share; each error names op and argument."""

from __future__ import annotations

import numbers
from collections.abc import Iterable

import torch

from ...backends import KERNEL_DTYPES

_IN_FLOAT32 = "the extension computes in float32, for float32, float16 and bfloat16"


def check_floating(op: str, name: str, tensor) -> None:
    """TypeError where ``tensor`` is no floating-point tensor."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")


def beyond_float32(tensors: Iterable[torch.Tensor | None]) -> str | None:
    """Why the extension's code that computes in float32 cannot take ``tensors``, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return _IN_FLOAT32
    return None


def is_number(value) -> bool:
    """Whether ``value`` is a real number, Python's or a symbolic one."""
    # Python's own numbers first: an abstract class takes 0.2 us.
    return type(value) in (float, int) or isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat)


def check_number(op: str, name: str, value) -> None:
    """TypeError where ``value`` is no real number."""
    if not is_number(value):
        got = f"str {value!r}" if isinstance(value, str) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a number, got {got}")


def check_integer(op: str, name: str, value) -> None:
    """TypeError where ``value`` is no integer."""
    if type(value) is not int and not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")


def check_flag(op: str, name: str, value) -> None:
    """TypeError where ``value`` is neither True nor False, nor an integer in their place."""
    if not isinstance(value, bool | numbers.Integral | torch.SymBool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
