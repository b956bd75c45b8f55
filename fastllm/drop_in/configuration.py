"""A configuration's other face: all that transformers' configuration is, but for the attention that it names.

A module asks its configuration which attention it is to call, and one configuration is shared: by the modules of a
model, by instances, with the user. So a module that is to call ours gets a :func:`face` of the same configuration. It
has the same attributes, for both are one ``__dict__``: what is set on either is set on both.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator

import torch

from .swap import MadeClasses

NAME = "fastllm"
INTERNAL = "_attn_implementation_internal"


def registered(name: str) -> Callable | None:
    """What transformers calls for the attention ``name``; None for the code of the model."""
    functions = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    return functions.get(name)


class Switch:
    """Whether the faces of one configuration name our attention now.

    ``before`` is the attention that was named when they were made, and ``function`` what was registered by that name:
    as soon as the configuration names another, or another is registered, that is the answer. ``passed_over`` are
    arguments that it took no notice of. ``additive_masks``: the model's code changes its masks as the numbers that
    eager attention adds. ``own`` has a value for each thread with a call at work: whether it takes the model's own
    path. ``last`` is that of the last call: activation checkpointing runs layers again when no call is at work. Before
    the first call of a model whose own attention is eager, a layer alone takes its own path.
    """

    def __init__(self, before: str, passed_over: frozenset[str] = frozenset()):
        self.before = before
        self.passed_over = passed_over
        self.function = registered(before)
        self.additive_masks = False
        self.active = True
        self.own: dict[int, bool] = {}
        self.last = self._first()

    def _first(self) -> bool:
        return self.before == "eager"

    @contextlib.contextmanager
    def call(self, own: bool) -> Iterator[None]:
        """For the time of a model's forward; ``own`` holds for the calls inside it as well."""
        thread = threading.get_ident()
        outer = self.own.get(thread)
        self.own[thread] = self.last = bool(outer) or own
        try:
            yield
        finally:
            if outer is None:
                del self.own[thread]
            else:
                self.own[thread] = outer

    def at_work(self) -> bool:
        """Whether this thread is in a model's forward, or a compiler follows one."""
        return torch.compiler.is_compiling() or threading.get_ident() in self.own

    def names_ours(self, internal: str | None, only_in_a_call: bool) -> bool:
        if not self.active or internal != self.before:
            return False
        if torch.compiler.is_compiling():
            return not self.last
        if registered(self.before) is not self.function:
            return False
        return not self.own.get(threading.get_ident(), only_in_a_call or self.last)

    def __getstate__(self):
        return vars(self) | {"own": {}, "last": self._first()}


class _SameClass(type):
    """Makes a class be found where another is the key, as in transformers' tables of models by configuration."""

    def __eq__(cls, other):
        return cls is other or vars(cls).get("fastllm_of") is other

    def __hash__(cls):
        of = vars(cls).get("fastllm_of")
        return type.__hash__(cls) if of is None else hash(of)


class Face(metaclass=_SameClass):
    """Marks the classes made here.

    ``fastllm_original`` is the configuration, ``fastllm_switch`` its :class:`Switch`, ``fastllm_in_a_call`` whether our
    attention is named only while a forward of the model is at work.
    """

    __slots__ = ("fastllm_in_a_call", "fastllm_original", "fastllm_switch")

    def __init_subclass__(cls, **kwargs):
        # The original's own hook, which makes a dataclass of every subclass, must not see this one.
        pass

    @property
    def _attn_implementation_internal(self):
        internal = self.__dict__.get(INTERNAL)
        switch = switch_of(self)
        return NAME if switch is not None and switch.names_ours(internal, self.fastllm_in_a_call) else internal

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value):
        # The caller asks for an attention by name, which stays from now on, even if it is the original one.
        switch = switch_of(self)
        if switch is not None:
            switch.active = value == NAME
        if switch is None or value != NAME:
            vars(self)[INTERNAL] = value

    def __reduce_ex__(self, protocol):
        switch = switch_of(self)
        if switch is None:
            return super().__reduce_ex__(protocol)
        return face, (self.fastllm_original, switch, self.fastllm_in_a_call)

    def __eq__(self, other):
        original = getattr(self, "fastllm_original", None)
        return super().__eq__(other) if original is None else original == unfaced(other)


def switch_of(config) -> Switch | None:
    """None for a fresh configuration of a face's class, which transformers makes to compare with."""
    return getattr(config, "fastllm_switch", None)


_classes = MadeClasses()


def _make_class(cls: type) -> type:
    meta = _SameClass if type(cls) is type else type("_SameClass", (_SameClass, type(cls)), {})
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "fastllm_of": cls}
    return types.new_class(cls.__name__, (Face, cls), {"metaclass": meta}, lambda space: space.update(body))


def unfaced(config):
    """The configuration that ``config`` is a face of, or ``config`` itself."""
    return getattr(config, "fastllm_original", config)


def face(config, switch: Switch, in_a_call: bool):
    """The other face of ``config``; ``in_a_call``: it names our attention only while a model's forward is at work."""
    cls = type(config)
    made = object.__new__(_classes.get(cls, None, lambda: _make_class(cls)))
    object.__setattr__(made, "__dict__", vars(config))
    object.__setattr__(made, "fastllm_original", config)
    object.__setattr__(made, "fastllm_switch", switch)
    object.__setattr__(made, "fastllm_in_a_call", in_a_call)
    return made
