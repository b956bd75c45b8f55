"""Foreign forwards, run on a stand-in for their module; and the attributes that such a finding rests on."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .plain import hooked

PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType)
CONTAINERS = (list, dict, set, OrderedDict, deque)
# What torch.nn.Module keeps for itself, whose parts and hooks are looked at apart, and marks that others leave.
OWN = {*vars(torch.nn.Module()), "_compiled_call_impl", "_is_hf_initialized"}
OPAQUE = object()


class Differs(Exception):
    """A probe's finding, for the report."""


def _frozen(value):
    """``value`` for comparison where it is plain or made of plain values; else :data:`OPAQUE`."""
    kind = type(value)
    if kind in PLAIN_TYPES:
        return value
    if kind in (list, tuple, torch.Size, dict, OrderedDict):
        parts = tuple(_frozen(v) for v in (value.items() if isinstance(value, dict) else value))
        return OPAQUE if any(part is OPAQUE for part in parts) else (kind.__name__, parts)
    return OPAQUE


def settings_of(module: torch.nn.Module, but: str | float | None = None) -> tuple[tuple[str, object], ...]:
    """The attributes that are plain values, functions, or containers of such, except ``but``."""
    found = ((n, _frozen(v)) for n, v in sorted(vars(module).items()) if n not in OWN and n != but)
    return tuple((name, value) for name, value in found if value is not OPAQUE)


class Attributes(NamedTuple):
    """What a module had when it was measured: its ``settings``, and the ``count`` of all that it had.

    ``unset`` are the parameters and buffers that were None. The other names in the code of its class are what the code
    may look for, should the module get it: ``absent`` those that nobody had, ``of_class`` those that the class has.
    """

    settings: tuple[tuple[str, object], ...]
    count: int
    unset: tuple[str, ...]
    absent: tuple[str, ...]
    of_class: tuple[str, ...]


def attributes_of(module: torch.nn.Module, but: str | float | None = None) -> Attributes:
    """What :func:`changed` compares later; the attribute ``but`` may change."""
    named: set[str] = set()
    for cls in type(module).__mro__:
        for value in () if cls is torch.nn.Module else vars(cls).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function):
                named |= _names_in(function.__code__) | _names_in(getattr(inspect.unwrap(function), "__code__", None))
    unset = tuple(name for name, value in [*module._parameters.items(), *module._buffers.items()] if value is None)
    others = sorted(named.difference(_held(module)))
    absent = tuple(name for name in others if not hasattr(type(module), name))
    of_class = tuple(name for name in others if hasattr(type(module), name))
    return Attributes(settings_of(module, but), _count(vars(module)), unset, absent, of_class)


def _held(module: torch.nn.Module) -> Iterator[str]:
    for place in (vars(module), module._parameters, module._buffers, module._modules):
        yield from place


def _count(state: dict) -> int:
    return len(state) + len(state["_parameters"]) + len(state["_buffers"]) + len(state["_modules"])


def _names_in(code) -> set[str]:
    """The attributes that ``code`` may look for, by name or by a string, in its inner functions too."""
    if not isinstance(code, types.CodeType):
        return set()
    found = set(code.co_names).union(*(_names_in(constant) for constant in code.co_consts))
    return found.union(constant for constant in code.co_consts if isinstance(constant, str))


def changed(module: torch.nn.Module, measured: Attributes) -> bool:
    """Whether one of the settings has another value now, or there is something that the code looks for."""
    state = vars(module)
    for name, value in measured.settings:
        now = state.get(name, OPAQUE)  # which no value equals
        if now is not value and _frozen(now) != value:
            return True
    if measured.unset and any(getattr(module, name, None) is not None for name in measured.unset):
        return True
    if torch.compiler.is_compiling():
        # torch 2.11 does not trace the length of a module's dictionary, and no guard looks into it, but for hasattr().
        if any(hasattr(module, name) for name in measured.absent):
            return True
        return any(name in state for name in measured.of_class)
    return _count(state) != measured.count and not {*measured.absent, *measured.of_class}.isdisjoint(_held(module))


# The name, the class and the attributes of each part of a module.
Parts = tuple[tuple[str, type, Attributes], ...]


def parts_of(parts: dict[str, torch.nn.Module]) -> Parts:
    """What :func:`as_measured` compares later."""
    return tuple((name, type(part), attributes_of(part)) for name, part in parts.items())


def as_measured(module: torch.nn.Module, parts: Parts) -> bool:
    """Whether ``module`` still has these ``parts``, unchanged, and nobody looks at what goes through them."""
    for name, cls, attributes in parts:
        part = module._modules.get(name)
        if part is None or type(part) is not cls or getattr(part.forward, "__func__", None) is not cls.forward:
            return False
        if hooked(part) or changed(part, attributes):
            return False
    return True


def keeps(module: torch.nn.Module) -> str | None:
    """Why no finding about ``module`` could last: tensors that are no parameters and change unseen; or None."""
    if any(b is not None for b in module._buffers.values()):
        return "it keeps buffers, on which its forward may depend"
    if any(isinstance(value, torch.Tensor) for name, value in vars(module).items() if name not in OWN):
        return "it keeps a tensor that is neither parameter nor buffer, on which its forward may depend"
    return None


# Above it an attribute is taken for a size, and not for a bound or a factor of values. A guess.
LARGEST_NUMBER = 1e4


def own_numbers(module: torch.nn.Module, sizes: set[int]) -> list[float]:
    """The attributes of ``module`` that may be bounds or factors: positive numbers, but for integers in ``sizes``."""
    given = [v for v in vars(module).values() if type(v) is float or (type(v) is int and v not in sizes)]
    return list(dict.fromkeys(float(v) for v in given if 0 < v < LARGEST_NUMBER))


def _copied(value):
    return type(value)(value) if type(value) in CONTAINERS else value


def _identities(state: dict) -> dict:
    """What a forward that changes nothing leaves as it is; containers count by their elements."""

    def of(value):
        if isinstance(value, dict):
            return [(id(key), id(element)) for key, element in value.items()]
        return [id(element) for element in value]

    return {name: of(value) if type(value) in CONTAINERS else id(value) for name, value in state.items()}


def stand_in(module: torch.nn.Module, training: bool, **parts) -> torch.nn.Module:
    """An object of ``module``'s class with its attributes, but for ``parts``; hooks do not run, ``module`` is safe."""
    made = object.__new__(type(module))
    made.__dict__ = {name: _copied(value) for name, value in vars(module).items()} | {"training": training} | parts
    return made


@contextlib.contextmanager
def undisturbed(gpus: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within the block probes do not depend on the modes that accelerate() was called in, nor on generators' states.

    These modes are inference mode, no_grad, autocast and a default device. The generators are the CPU's and ``gpus``'.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(gpus)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def found_or_why(recognise: Callable, *args, gpus: Iterable[torch.device] = ()):
    """What ``recognise(*args)`` finds, :func:`undisturbed`; or, where outputs differ or a forward fails, why not."""
    with undisturbed(gpus):
        try:
            return recognise(*args)
        except Differs as error:
            return str(error)
        except Exception as error:
            return refusal(error)


def refusal(error: Exception, inputs: str = "a lone random tensor") -> str:
    """Why a foreign forward that raised ``error`` on ``inputs`` is nothing that was found."""
    message = str(error).split("\n")[0][:120]
    return f"its forward does not take {inputs} ({type(error).__name__}: {message})"


def run(module: torch.nn.Module, *args):
    """The forward of a stand-in.

    Raises:
        Differs: it sets attributes, which nobody would do in its place.
    """
    before = dict(vars(module))
    identities = _identities(before)
    out = type(module).forward(module, *args)
    if _identities(vars(module)) != identities:
        raise Differs("its forward sets attributes")
    return out
