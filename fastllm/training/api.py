"""The names of :mod:`fastllm.training`: importing this imports torch."""

from .config import RunConfig, TrainingConfig, build_run_config, read_run_config
from .evaluate import Evaluation, evaluate
from .guard import Diverged, Failed
from .launch import RUNS, resume, train
from .run import Result

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
