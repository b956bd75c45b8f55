"""The names of the package ``fastllm``: importing this imports torch and registers the operators."""

from . import functional, losses, nn
from .backends import BackendError, backend
from .drop_in import Report, accelerate, accelerated, revert
from .registry import OPS
from .version import __version__

__all__ = [
    "OPS",
    "BackendError",
    "Report",
    "__version__",
    "accelerate",
    "accelerated",
    "backend",
    "functional",
    "info",
    "losses",
    "nn",
    "revert",
]


def info() -> str:
    """What serves each op on this machine and why, with the versions that matter, as printed by ``fastllm info``."""
    from .environment import describe

    return describe()
