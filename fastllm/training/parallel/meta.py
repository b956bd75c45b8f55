"""A model built without memory for its weights, which are then drawn one parameter at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.overrides import TorchFunctionMode

# Methods that fill a whole tensor, as do the functions of torch.nn.init: what remains of a parameter's initialisation
# is the last of them, and what is filled into its parts afterwards.
_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_)
# Those that draw no random number.
_QUIET = (torch.Tensor.zero_, torch.Tensor.fill_, nn.init.zeros_, nn.init.ones_, nn.init.constant_)


class _Record(TorchFunctionMode):
    """``torch.empty`` gives tensors without memory; what is filled into them is written down."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Tensor, Callable, tuple, dict]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta" if kwargs.get("device") is None else kwargs["device"]
        elif func in _FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor, *rest = args or (kwargs.pop("tensor"),)
            if tensor.is_meta:
                self.calls.append((tensor, func, tuple(rest), kwargs))
                return tensor
        return func(*args, **kwargs)


def on_meta(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[..., None]]:
    """What ``make`` builds, its parameters without memory, and what gives them theirs.

    Returns:
        The model, and ``draw(device, random=True)``: to be called once its parameters are sharded, it takes memory on
        ``device`` and draws the very numbers that ``make`` would have drawn from torch's generator, one whole parameter
        in host memory at a time. Without ``random`` the weights are left for a checkpoint to fill.

    Raises:
        NotImplementedError: a parameter is not filled whole, or a part of it is filled with random numbers.
    """
    with _Record() as record:
        model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # A parameter that was replaced, as a tied head's is, has no name; its numbers are drawn all the same.
    calls: list[Any] = []
    # What is filled into parts of a parameter after it was filled whole.
    parts: dict[str | None, list[Callable[[torch.Tensor], object]]] = {}
    for tensor, fill, args, kwargs in record.calls:
        if isinstance(tensor, nn.Parameter):
            name = names.get(id(tensor))
            calls.append((name, tensor.shape, fill, args, kwargs))
            parts.pop(name, None)
        elif isinstance(tensor._base, nn.Parameter) and fill in _QUIET:
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            parts.setdefault(names.get(id(tensor._base)), []).append(partial(_fill_part, place, fill, args, kwargs))
        else:
            raise NotImplementedError(
                f"{type(model).__name__}: {fill.__name__} fills part of a parameter; expected whole ones, or constants"
            )
    last = {name: index for index, (name, *_) in enumerate(calls) if name is not None}
    for name, parameter in model.named_parameters():
        if name not in last or not parameter.is_meta:
            raise NotImplementedError(
                f"{type(model).__name__}: {name} is not filled in place; expected one of torch.nn.init's functions"
            )

    def draw(device: torch.device, random: bool = True) -> None:
        _take_memory(model, device)
        if not random:
            return
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for index, (name, shape, fill, args, kwargs) in enumerate(calls):
                if last.get(name) != index and fill in _QUIET:
                    continue
                whole = fill(torch.empty(shape), *args, **kwargs)
                if last.get(name) == index:
                    for fill_part in parts.get(name, ()):
                        fill_part(whole)
                    copy_part(parameters[name], whole)

    return model, draw


def _fill_part(place: tuple, fill: Callable, args: tuple, kwargs: dict, whole: torch.Tensor) -> None:
    """``fill`` a part of ``whole``, which is contiguous; ``place``: its size, strides and offset."""
    fill(whole.as_strided(*place), *args, **kwargs)


def _take_memory(model: nn.Module, device: torch.device) -> None:
    """Memory on ``device`` for all of ``model``; tied parameters stay tied, and buffers keep their values."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    ties = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    model.to_empty(device=device)
    for name, other in ties.items():  # to_empty gives each name memory of its own
        module, _, last_part = name.rpartition(".")
        setattr(model.get_submodule(module), last_part, model.get_parameter(other))
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])


def copy_part(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Fill ``parameter`` with ``whole``, or with this rank's part of it."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    part = whole[tuple(slice(begin, begin + size) for begin, size in itertools.zip_longest(offset, shape))]
    parameter.to_local().copy_(part)
