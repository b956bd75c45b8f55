"""Checks of the losses' arguments, and what they share; each error names the loss and the argument."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..backends import under_transform
from ..ops.shared.check import check_dense, check_floating, check_number


def readable(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: on a CPU, outside of compiled code and of transforms."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not under_transform()


def bounded(loss: str, name: str, value, *, least: float = 0.0, open_end: bool = True) -> Any:
    """``value`` where it is finite and above ``least``, or equal to it where the end is not open.

    As a float: no operator takes an integer of more than 64 bits, and some take no boolean.
    """
    check_number(loss, name, value)
    if not least <= value < math.inf or (open_end and value == least):
        raise ValueError(
            f"{loss}: {name} must be finite and {'above' if open_end else 'at least'} {least}, got {value}"
        )
    return as_float(value)


def as_float(value) -> Any:
    """A number as a float; a symbolic one as it is."""
    return value if isinstance(value, torch.SymInt | torch.SymFloat) else float(value)


def smoothing(loss: str, value):
    """``label_smoothing`` as a float. ValueError: it is not at least 0 and below 0.5."""
    value = bounded(loss, "label_smoothing", value, open_end=False)
    if value >= 0.5:
        raise ValueError(f"{loss}: label_smoothing must be below 0.5, got {value}")
    return value


def check_tensor(loss: str, name: str, tensor, like: torch.Tensor | None = None, shape=None) -> None:
    """A dense floating-point tensor; of ``shape`` and on ``like``'s device, where those are given."""
    check_floating(loss, name, tensor)
    check_place(loss, name, tensor, like, shape)


def check_real(loss: str, name: str, tensor) -> None:
    """A dense tensor of booleans or real numbers."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{loss}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_complex() or tensor.is_quantized:
        raise TypeError(f"{loss}: {name} must hold booleans or real numbers, got {tensor.dtype}")
    check_dense(loss, name, tensor)


def check_place(loss: str, name: str, tensor, like, shape) -> None:
    """``tensor`` is of ``shape`` and on ``like``'s device, where those are given."""
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{loss}: {name} must be of shape {list(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{loss}: {name} is on {tensor.device}, expected {like.device}")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sequences(loss: str, **given) -> list[torch.Tensor]:
    """A number a sequence each, (B,) of one B that is not 0, in at least fp32."""
    (first, tensor), *_ = given.items()
    check_tensor(loss, first, tensor)
    if tensor.dim() != 1 or len(tensor) == 0:
        raise ValueError(f"{loss}: {first} must be of shape (B,), a number a sequence, got {list(tensor.shape)}")
    for name, other in given.items():
        check_tensor(loss, name, other, tensor, tensor.shape)
    return [wide(other) for other in given.values()]


def with_metrics(loss: torch.Tensor, metrics: dict[str, torch.Tensor], wanted: bool) -> Any:
    """What a loss returns: the loss, or the pair of it and the metrics where they are ``wanted``."""
    if not wanted:
        return loss
    return loss, {name: value.detach() for name, value in metrics.items()}
