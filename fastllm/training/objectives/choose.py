"""The objective that the settings name, on its data."""

from __future__ import annotations

from typing import Any

from ..checkpoints.model_folder import load_language_model
from ..objective import Objective
from ..objective_config import ObjectiveConfig
from .distill import Distill, TeacherTerm
from .examples import SMOOTHING, Answer, Classify, Seq2Seq
from .masked import MaskedLM
from .prompts import DPO, Instruct
from .streams import SHORT_WINDOWS, CausalLM, PrefixLM


def make_objective(config: ObjectiveConfig, dataset: Any, context_length: int, batch_size: int, seed: int) -> Objective:
    """The objective on ``dataset``.

    Raises:
        InputError: the data do not serve it.
    """
    arguments = (dataset, context_length, batch_size, seed)
    name = config.objective
    if name in ("mlm", "nsp", "mlm+nsp"):
        return MaskedLM(
            *arguments, masking="mlm" in name, pairs="nsp" in name, probability=config.mask_probability,
            whole_word=config.whole_word,
        )  # fmt: skip
    if name == "seq2seq":
        smoothing = SMOOTHING if config.label_smoothing is None else config.label_smoothing
        return Seq2Seq(*arguments, label_smoothing=smoothing)
    if name == "classify":
        return Classify(
            *arguments, label_smoothing=config.label_smoothing or 0.0, token_dropout=config.token_dropout
        )  # fmt: skip
    if name == "dpo":
        return DPO(*arguments, beta=config.beta, kind=config.dpo_loss)
    if name == "distill":
        divergence = TeacherTerm(config.teacher_share, config.direction, config.temperature, config.jsd_beta)
        return Distill(*arguments, teacher=load_language_model(config.teacher or "", "teacher"), divergence=divergence)
    if name == "causal":
        short = config.short_windows
        if short is None:
            short = 0.0 if config.pretrained else SHORT_WINDOWS
        return CausalLM(*arguments, short_windows=short)
    return {"prefix": PrefixLM, "answer": Answer, "instruct": Instruct}[name](*arguments)
