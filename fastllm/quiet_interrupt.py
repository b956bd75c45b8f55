"""Ctrl-C while the command line is still importing torch ends it in one line, as it does later on.

Nothing here imports torch: the package imports this first. The command's own handling is in :mod:`fastllm.cli`.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path, PurePath


def is_command() -> bool:
    """Whether this process is ``fastllm ...`` or ``python -m fastllm ...``, not a program that imports fastllm."""
    if sys.argv and PurePath(sys.argv[0]).stem in ("fastllm", "fastllm-script"):
        return True
    arguments = sys.orig_argv
    return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["fastllm"]


def late_names(package: str, file: str) -> Callable[[str], object]:
    """A package's ``__getattr__``: the names of its module ``api``, which is imported at the first use of one.

    Importing torch takes seconds, and the command line imports it for the commands that need it alone. So ``__all__``
    is read from the text of ``api.py`` beside the package's own ``file``.
    """

    @functools.cache
    def names() -> tuple[str, ...]:
        tree = ast.parse(Path(file).with_name("api.py").read_text("utf-8"))
        (value,) = (
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        return (*ast.literal_eval(value), "__all__")

    def find(name: str) -> object:
        if name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        api = import_module(f"{package}.api")
        # All of them at once: a submodule of the same name, which api has just imported, stands there by now.
        vars(sys.modules[package]).update({each: getattr(api, each) for each in names()})
        return getattr(api, name)

    return find


def install() -> None:
    """Let an interrupt that nobody catches show no traceback, if this process is the command line."""
    if not is_command():
        return
    before = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            print("fastllm: error: interrupted", file=sys.stderr)
        else:
            before(kind, error, traceback)

    sys.excepthook = hook
