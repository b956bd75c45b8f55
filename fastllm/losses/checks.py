"""Checks of the losses' arguments, and what they share; each error names the loss and the argument."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..backends import under_transform
from ..ops.shared.check import check_number


def readable(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: on a CPU, outside of compiled code and of transforms."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not under_transform()


def check_bound(loss: str, name: str, value, *, least: float = 0.0, open_end: bool = True) -> None:
    """``value`` is finite and above ``least``, or equal to it where the end is not open."""
    check_number(loss, name, value)
    if not least <= value < math.inf or (open_end and value == least):
        raise ValueError(
            f"{loss}: {name} must be finite and {'above' if open_end else 'at least'} {least}, got {value}"
        )


def check_finite(loss: str, name: str, value) -> None:
    """ValueError or TypeError where ``value`` is no finite number."""
    check_number(loss, name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{loss}: {name} must be finite, got {value}")


def check_smoothing(loss: str, value) -> None:
    """``label_smoothing`` is at least 0 and below 0.5."""
    check_bound(loss, "label_smoothing", value, open_end=False)
    if value >= 0.5:
        raise ValueError(f"{loss}: label_smoothing must be below 0.5, got {value}")


def check_kind(loss: str, name: str, value, kinds) -> None:
    """``value`` is one of ``kinds``."""
    if value not in kinds:
        raise ValueError(f"{loss}: {name} must be one of {', '.join(kinds)}; got {value!r}")


def check_tensor(loss: str, name: str, tensor, like: torch.Tensor | None = None, shape=None) -> None:
    """A floating-point tensor; of ``shape`` and on ``like``'s device, where those are given."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{loss}: {name} must be a floating-point tensor, got {got}")
    check_place(loss, name, tensor, like, shape)


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
