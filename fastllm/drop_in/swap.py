"""Giving one module another forward, and taking it back.

The module gets a class of its own: a subclass of the class that it has, of the same name, which overrides ``forward``
and what its kind names beside it. So parameters, buffers, hooks, ``isinstance``, attributes and state_dict stay what
they are, and no other instance changes. FSDP2 and torch.nn.utils.parametrize do the same, and each may come before or
after this.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.utils.parametrize import is_parametrized

from .calls import serve


@dataclass(frozen=True)
class Kind:
    """What replaces a forward: ``name`` is a key of :data:`FORWARDS`, ``options`` what that forward must know."""

    name: str
    options: Any = None


# Kind name -> forward(module, original_forward, options, *args, **kwargs).
FORWARDS: dict[str, Callable] = {}
# Kind name -> what its classes override beside the forward.
MEMBERS: dict[str, dict[str, property]] = {}


def forward_of(name: str, **members: property) -> Callable[[Callable], Callable]:
    """Register a function as the forward of kind ``name``, whose classes have these ``members`` too."""

    def decorate(function: Callable) -> Callable:
        FORWARDS[name] = function
        MEMBERS[name] = members
        return function

    return decorate


class Accelerated:
    """Marks classes made here; ``fastllm_original`` is the class replaced, ``fastllm_kind`` the :class:`Kind`."""

    fastllm_original: type
    fastllm_kind: Kind

    def __init_subclass__(cls, **kwargs):
        # The original's own hook, which may keep a register of subclasses, must not see this one.
        pass

    def __reduce_ex__(self, protocol):
        made, original, kind = _made_class(type(self))
        reduced = super().__reduce_ex__(protocol)
        if made is not type(self) or isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        args = tuple(original if arg is made else arg for arg in args)
        return (_restore, (kind, make, args), *rest)


def _restore(kind: Kind, make: Callable, args: tuple) -> torch.nn.Module:
    module = make(*args)
    swap_forward(module, kind)
    return module


def _made_class(cls: type) -> tuple[type, type, Kind]:
    made = next(c for c in cls.__mro__ if "fastllm_original" in vars(c))
    return made, made.fastllm_original, made.fastllm_kind


class MadeClasses:
    """Classes made from others, one for each ``key``, that live no longer than somebody uses them."""

    def __init__(self):
        self._of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, original: type, key, make: Callable[[], type]) -> type:
        with self._lock:
            made = self._of.setdefault(original, weakref.WeakValueDictionary())
            found = made.get(key)
            if found is None:
                found = made[key] = make()
            return found

    def __len__(self):
        return sum(len(made) for made in list(self._of.values()))


_classes = MadeClasses()


def _class_for(original: type, kind: Kind) -> type:
    return _classes.get(original, kind, lambda: _make_class(original, kind))


def _make_class(original: type, kind: Kind) -> type:
    before = original.forward
    replacement = FORWARDS[kind.name]
    options = kind.options

    @functools.wraps(before)
    def forward(self, *args, **kwargs):
        return serve(self, replacement, self, before, options, *args, **kwargs)

    # Code that reads signatures (transformers' Trainer) sees the original's; code that unwraps must not run it.
    vars(forward)["__signature__"] = inspect.signature(before)
    del forward.__wrapped__
    namespace = {
        **MEMBERS[kind.name],
        "forward": forward,
        "fastllm_original": original,
        "fastllm_kind": kind,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return types.new_class(original.__name__, (Accelerated, original), {}, lambda body: body.update(namespace))


def _first_parametrized(module: torch.nn.Module) -> str:
    return next(iter(cast(torch.nn.ModuleDict, module.parametrizations)))


def swap_forward(module: torch.nn.Module, kind: Kind) -> None:
    """Let ``module``'s forward be that of ``kind``, if it is not yet.

    Raises:
        TypeError: Python refuses another class for this object.
    """
    if isinstance(module, Accelerated) and module.fastllm_kind == kind:  # made by type(another)(...)
        return
    cls = type(module)
    if is_parametrized(module) and isinstance(vars(cls).get(_first_parametrized(module)), property):
        # remove_parametrizations() deletes the properties from the module's own class, and gives it the class below.
        base, *others = cls.__bases__
        module.__class__ = _again(cls, (_class_for(base, kind), *others))
    else:
        module.__class__ = _class_for(cls, kind)


def _again(cls: type, bases: tuple[type, ...]) -> type:
    """``cls`` with other bases."""
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, {}, lambda namespace: namespace.update(body))


def _without(cls: type) -> type:
    """``cls`` with the class made here taken out, also from below one that was derived from it since."""
    if "fastllm_original" in vars(cls):
        return cls.fastllm_original
    if not issubclass(cls, Accelerated):
        return cls
    return _again(cls, tuple(_without(base) for base in cls.__bases__))


def restore_forward(module: torch.nn.Module) -> bool:
    """Undo :func:`swap_forward`; returns whether there was anything to undo."""
    if not isinstance(module, Accelerated):
        return False
    made, original, _ = _made_class(type(module))
    for name, value in list(vars(module).items()):
        # Wrappers of the instance's forward (accelerate's hooks) have kept it under a name of their own.
        if inspect.ismethod(value) and value.__func__ is made.forward:
            vars(module)[name] = types.MethodType(original.forward, module)
    module.__class__ = _without(type(module))
    return True


def original_forward(module: torch.nn.Module) -> Callable:
    """The forward that the module's class has, or had before :func:`swap_forward`."""
    return _made_class(type(module))[1].forward if isinstance(module, Accelerated) else type(module).forward
