"""From text to a trained model: settings, optimisers, checkpoints, the loop."""

from typing import TYPE_CHECKING

from .. import quiet_interrupt

if TYPE_CHECKING or not quiet_interrupt.is_command():
    from .api import *  # noqa: F403
    from .api import __all__  # noqa: F401
else:
    __getattr__ = quiet_interrupt.late_names(__name__, __file__)
