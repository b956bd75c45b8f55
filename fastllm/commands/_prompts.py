"""What ``fastllm eval`` makes of prompts with answers and of preferences, and of another model beside the first."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..config import InputError
from ..data import Tokenizer
from ..models import LanguageModel
from ..tasks.features import answer_features, preference_features
from ..tasks.metrics import wilson_interval
from ..tasks.preferences import preference_scores, right_pairs, score_pairs
from ..tasks.prompts import prompt_form, rendered
from ..tasks.read import read_examples
from ..training.checkpoints.model_folder import language_model_folder, load_language_model
from ..training.config import read_run_config
from ..training.objective import target_count
from ..training.objectives import ObjectiveConfig
from ..training.objectives.streams import perplexity
from ..training.prompts import fitting
from ..training.run import CONFIG

# Pairs, or windows of a text, that are scored at a time. A guess.
ROWS = 8


def form_asked(arguments: argparse.Namespace, task: str) -> str | None:
    """What JSON lines a language model is to be scored on: "instruct" or "dpo"; None for text.

    Raises:
        InputError: files of several forms are given, or an option that is not for the form.
    """
    forms = {prompt_form(path) for path in arguments.data} if task == "generate" else {None}
    if len(forms) > 1:
        raise InputError("data: expected files of one form, got text, prompts with answers and preferences together")
    form = forms.pop() if forms else None
    for name, wanted in (("reference", "dpo"), ("beta", "dpo"), ("teacher", None)):
        if getattr(arguments, name) is not None and (form != wanted or task != "generate" or not arguments.data):
            raise InputError(f"{name}: is for {'preferences' if wanted else 'text'} and a language model")
    if form is not None and arguments.blimp is not None:
        raise InputError("blimp: is scored beside text, not beside prompts")
    if arguments.beta is not None and not 0 < arguments.beta < math.inf:
        raise InputError(f"beta: expected a number above 0, got {arguments.beta}")
    return form


def beside(path: str, argument: str, tokenizer) -> LanguageModel:
    """Another language model of the same vocabulary.

    Raises:
        InputError: there is none, or it has another tokenizer.
    """
    folder, _ = language_model_folder(path, argument)
    if Tokenizer.load(folder / "tokenizer.json").fingerprint != tokenizer.fingerprint:
        raise InputError(f"{argument}: {folder} has another vocabulary than the model: their tokenizers differ")
    return load_language_model(path, argument)


def scores_of_prompts(model, tokenizer, form: str, arguments) -> tuple[dict, list[dict]]:
    """Scores on prompts with answers ("instruct") or on preferences ("dpo")."""
    examples = read_examples(form, arguments.data)
    examples = [rendered(example, tokenizer) for example in examples[: arguments.limit or None]]
    kept = fitting(examples, tokenizer, model.config.context_length)
    scores = {"examples": len(kept)}
    if len(kept) < len(examples):
        scores["left_out"] = len(examples) - len(kept)
    with torch.no_grad():
        more, lines = (_of_preferences if form == "dpo" else _of_instructions)(model, tokenizer, kept, arguments)
    return {**scores, **more}, lines


def _of_instructions(model, tokenizer, examples, arguments) -> tuple[dict, list[dict]]:
    features = answer_features(examples, tokenizer, model.config.context_length)
    nats, counts = [], []
    for number in range(len(features)):
        batch = {name: tensor.to(model.head.weight.device) for name, tensor in features.batch([number]).items()}
        counts.append(target_count(batch))
        nats.append(model.loss(batch["tokens"], batch["targets"]).item() * counts[-1])
    loss = sum(nats) / sum(counts)
    lines = [{**e, "loss": a / n} for e, a, n in zip(examples, nats, counts, strict=True)]
    return {"perplexity": perplexity(loss), "loss": loss, "tokens": sum(counts)}, lines


def _of_preferences(model, tokenizer, examples, arguments) -> tuple[dict, list[dict]]:
    features = preference_features(examples, tokenizer, model.config.context_length)
    own, reference, beta = score_pairs(model, features, ROWS), None, arguments.beta
    settings = _objective_of(arguments)
    path = arguments.reference
    if settings is not None and settings.objective == "dpo":
        path, beta = path or settings.pretrained, beta or settings.beta
    if path is not None:
        other = beside(path, "reference", tokenizer).to(model.head.weight.device)
        if other.config.context_length < model.config.context_length:
            raise InputError(f"reference: {path} reads {other.config.context_length} tokens, the model "
                             f"{model.config.context_length}")  # fmt: skip
        reference = score_pairs(other, features, ROWS)
    scores = preference_scores(own, reference, beta or ObjectiveConfig.beta)
    interval = wilson_interval(right_pairs(own), len(examples))
    scores = {
        "preference_accuracy": scores.pop("preference_accuracy"),
        "preference_accuracy_interval": interval,
        **scores,
    }
    lines = [
        {**e, "log_prob_chosen": a, "log_prob_rejected": b}
        for e, a, b in zip(examples, own["chosen"].tolist(), own["rejected"].tolist(), strict=True)
    ]
    return scores, lines


def _objective_of(arguments) -> ObjectiveConfig | None:
    """The objective of the run that is scored, or None if the model belongs to no run."""
    path = Path(arguments.run or "") / CONFIG
    return read_run_config(path).objective if arguments.run and path.is_file() else None
