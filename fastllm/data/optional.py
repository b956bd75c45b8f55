"""Packages that only preparing data needs: imported when they are used, with one clear line where they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..config import InputError


def require(module: str, package: str, purpose: str, extra: str = "data") -> ModuleType:
    """Import ``module``.

    Raises:
        InputError: it is not installed; names ``purpose`` and the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {package}, which cannot be imported ({error}); pip install 'fastllm[{extra}]'"
        ) from error
