"""Fused kernels for PyTorch models, and a language model from scratch on top of them."""

from . import quiet_interrupt

quiet_interrupt.install()

from . import functional, losses, nn  # noqa: E402
from .backends import BackendError, backend  # noqa: E402
from .drop_in import Report, accelerate, accelerated, revert  # noqa: E402
from .registry import OPS  # noqa: E402
from .version import __version__  # noqa: E402

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
