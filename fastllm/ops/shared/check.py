"""Checks of arguments that ops share; each error names op and argument."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable

import torch

from ...backends import KERNEL_DTYPES

_IN_FLOAT32 = "the extension computes in float32, for float32, float16 and bfloat16"


# What PyTorch's operators compute in; 8 bits and fewer are for storage.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_INT64 = torch.iinfo(torch.int64)
_LARGEST = int(sys.float_info.max)


def is_floating(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is one of the dtypes that are computed in: floating point of 16, 32 or 64 bits."""
    return tensor.dtype in _FLOATING


def check_floating(op: str, name: str, tensor, *, nested: bool = False, sparse: bool = False) -> None:
    """TypeError where ``tensor`` is no floating-point tensor of 16, 32 or 64 bits, and dense.

    ``nested``, ``sparse``: it may be that too; PyTorch's operators serve such a call.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _FLOATING:
        got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if not (nested if tensor.is_nested else sparse):
        check_dense(op, name, tensor)


def check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    """TypeError where ``tensor`` is sparse, nested, or laid out as a library wants it."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor, got one that is {got}")


def beyond_float32(tensors: Iterable[torch.Tensor | None]) -> str | None:
    """Why the extension's code that computes in float32 cannot take ``tensors``, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return _IN_FLOAT32
    return None


def is_number(value) -> bool:
    """Whether ``value`` is a real number, Python's or a symbolic one, that a float can hold."""
    # Python's own numbers first: an abstract class takes 0.2 us.
    if type(value) is float:
        return True
    if type(value) is int:
        return -_LARGEST <= value <= _LARGEST
    return isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat)


def check_number(op: str, name: str, value) -> None:
    """TypeError where ``value`` is no real number, ValueError where it is one that no float can hold."""
    if not is_number(value):
        if isinstance(value, int):
            raise ValueError(f"{op}: {name} must fit in a float, got an integer of {value.bit_length()} bits")
        got = f"str {value!r}" if isinstance(value, str) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a number, got {got}")


def check_integer(op: str, name: str, value) -> None:
    """TypeError where ``value`` is no integer, ValueError where it is none of 64 bits."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if isinstance(value, int) and not _INT64.min <= value <= _INT64.max:
        raise ValueError(f"{op}: {name} must be an integer of 64 bits, got {value}")


def check_length(op: str, name: str, value) -> None:
    """TypeError where ``value`` is no integer, ValueError where it is negative."""
    check_integer(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {value}")


def check_choice(op: str, name: str, value, choices: Iterable[str]) -> None:
    """ValueError where ``value`` is none of ``choices``."""
    # An array is not compared: it would answer for each of its elements.
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")


def check_workspace(op: str, megabytes) -> float | None:
    """``max_workspace_mb`` as a float, None for none. TypeError or ValueError: it is no finite positive number."""
    if megabytes is None:
        return None
    check_number(op, "max_workspace_mb", megabytes)
    if not 0 < megabytes < math.inf:
        raise ValueError(f"{op}: max_workspace_mb must be positive and finite, got {megabytes}")
    return float(megabytes)


def check_flag(op: str, name: str, value) -> None:
    """TypeError where ``value`` is neither True nor False, nor an integer in their place."""
    if not isinstance(value, bool | numbers.Integral | torch.SymBool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
