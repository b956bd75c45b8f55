"""Fused kernels for PyTorch models, and a language model from scratch on top of them."""

from . import quiet_interrupt

quiet_interrupt.install()

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

if quiet_interrupt.is_command():
    __getattr__ = quiet_interrupt.late_names(__name__, __all__)
else:
    from .api import OPS, BackendError, Report, accelerate, accelerated, backend, functional, info, losses, nn, revert
