"""A module's keyword options are its function's: named, with their defaults, in the function alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def keyword_options(function: Callable) -> dict[str, Any]:
    """The keyword-only parameters of ``function`` that have a default: name -> default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def keywords_of(function: Callable, but: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorates an ``__init__(self, ..., **options)``: ``options`` are the keyword-only ones of ``function``.

    Those that ``__init__`` names itself and those in ``but`` are left out. It is called with all the others, defaults
    filled in, and its signature shows them. Another keyword is a TypeError.
    """

    def decorate(init: Callable) -> Callable:
        own = inspect.signature(init)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        leave = {p.name for p in named} | set(but)
        options = {name: default for name, default in keyword_options(function).items() if name not in leave}
        shown = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in options.items()]
        signature = own.replace(parameters=[*named, *shown])

        @functools.wraps(init)
        def filled(*args, **kwargs):
            signature.bind(*args, **kwargs)  # raises TypeError for an unknown keyword
            return init(*args, **{**options, **kwargs})

        filled.__dict__["__signature__"] = signature
        return filled

    return decorate
