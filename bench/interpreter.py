"""Environments of processes that compile Triton kernels, and of those that run them in Triton's interpreter."""

from __future__ import annotations

import os


def without_interpreter() -> dict[str, str]:
    """This process's environment with the interpreter off. Triton looks when a kernel is decorated, not later."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # 3.9 warns while it is unset; 1 is what it and older versions do by default.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return environment


def with_interpreter() -> dict[str, str]:
    """As :func:`without_interpreter`, with the interpreter on."""
    return {**without_interpreter(), "TRITON_INTERPRET": "1"}
