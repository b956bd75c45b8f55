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
    # Importing torch takes seconds: the command line (cli.py) imports it for the commands that need it.
    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import api

        return getattr(api, name)

else:
    from .api import OPS, BackendError, Report, accelerate, accelerated, backend, functional, info, losses, nn, revert
