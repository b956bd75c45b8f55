"""Fused kernels for PyTorch models, and a language model from scratch on top of them."""

from . import functional, nn
from .registry import OPS, BackendError, backend
from .version import __version__

__all__ = ["OPS", "BackendError", "__version__", "backend", "functional", "info", "nn"]


def info() -> str:
    """What serves each op on this machine and why, with the versions that matter, as printed by ``fastllm info``."""
    from .environment import describe

    return describe()
