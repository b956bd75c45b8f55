"""What a run learns: which batches it sees, what it minimises, and how the result is scored."""

from ..objective import Batch, Objective, rows_of, to_device
from ..objective_config import OBJECTIVES, ObjectiveConfig, fit_model
from .choose import make_objective
from .distill import Distill
from .examples import Answer, Classify, Seq2Seq
from .masked import MaskedLM
from .prompts import DPO, Instruct
from .streams import CausalLM, PrefixLM

__all__ = [
    "DPO",
    "OBJECTIVES",
    "Answer",
    "Batch",
    "CausalLM",
    "Classify",
    "Distill",
    "Instruct",
    "MaskedLM",
    "Objective",
    "ObjectiveConfig",
    "PrefixLM",
    "Seq2Seq",
    "fit_model",
    "make_objective",
    "rows_of",
    "to_device",
]
