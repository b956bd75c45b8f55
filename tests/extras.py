"""Packages that only some tests need, by the extra that brings them."""

from types import ModuleType

import pytest


def needed(module: str, extra: str) -> ModuleType:
    """``module``; where it is not installed, the test (or its file, at collection) is skipped and names ``extra``."""
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[{extra}]'")
