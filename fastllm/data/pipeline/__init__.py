"""Sources in, shards of clean text and a report out: streaming, in many processes, going on where it was killed."""

from .config import PipelineConfig
from .run import prepare_text

__all__ = ["PipelineConfig", "prepare_text"]
