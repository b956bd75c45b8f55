"""Fused kernels for PyTorch models, and a language model from scratch on top of them."""

from typing import TYPE_CHECKING

from . import quiet_interrupt

quiet_interrupt.install()

from .version import __version__  # noqa: E402, F401

if TYPE_CHECKING or not quiet_interrupt.is_command():
    from .api import *  # noqa: F403
    from .api import __all__  # noqa: F401
else:
    __getattr__ = quiet_interrupt.late_names(__name__, __file__)
