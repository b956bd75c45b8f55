"""A Python file of somebody else's as a module."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def module_of(file: Path, name: str) -> ModuleType:
    """``file``, whatever its suffix, imported as the module ``name``."""
    loader = SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "SourceFileLoader names its file"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
