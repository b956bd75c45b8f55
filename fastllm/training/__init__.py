"""From text to a trained model: settings, optimisers, checkpoints, the loop."""

from .config import RunConfig, TrainingConfig, build_run_config, read_run_config
from .evaluate import Evaluation, evaluate
from .loop import RUNS, Diverged, Result, resume, train

__all__ = [
    "RUNS",
    "Diverged",
    "Evaluation",
    "Result",
    "RunConfig",
    "TrainingConfig",
    "build_run_config",
    "evaluate",
    "read_run_config",
    "resume",
    "train",
]
