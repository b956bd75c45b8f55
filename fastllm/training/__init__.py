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
    # As in the package fastllm: what needs only the settings imports no torch.
    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import api

        return getattr(api, name)

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
