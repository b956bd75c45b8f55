"""From text to a trained model: settings, optimisers, checkpoints, the loop."""

from .. import quiet_interrupt

__all__ = [
    "RUNS",
    "Diverged",
    "Evaluation",
    "Failed",
    "Result",
    "RunConfig",
    "TrainingConfig",
    "build_run_config",
    "evaluate",
    "read_run_config",
    "resume",
    "train",
]

if quiet_interrupt.is_command():
    __getattr__ = quiet_interrupt.late_names(__name__, __all__)
else:
    from .api import (
        RUNS,
        Diverged,
        Evaluation,
        Failed,
        Result,
        RunConfig,
        TrainingConfig,
        build_run_config,
        evaluate,
        read_run_config,
        resume,
        train,
    )
