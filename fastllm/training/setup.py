"""What a run starts from: its data, its model, and the weights of another run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..config import InputError
from ..data import Dataset, Tokenizer, load_dataset, open_dataset
from ..data.dataset import tokenizer_of
from ..data.tokenizer_training import check_training
from ..models import Model, build_model
from ..tasks.read import read_examples
from ..tasks.store import TaskDataset, open_examples, prepare_examples, split_examples, texts
from .checkpoints.checkpoint import load_config
from .checkpoints.model_folder import language_model_folder, model_folder
from .config import RunConfig
from .lora import add_lora
from .objective import TrainedModel
from .objective_config import ObjectiveConfig, fit_model
from .parallel.ranks import ALONE, Ranks
from .prompts import prepare_prompts


def _with_tokenizer(config: RunConfig, folder: Path, argument: str) -> RunConfig:
    """``config`` with the tokenizer in ``folder``, which must be the one that it names already, if any.

    ``argument``: what names the folder.

    Raises:
        InputError: there is none, or another one is asked for.
    """
    tokenizer, given = folder / "tokenizer.json", config.data.tokenizer
    mine = Tokenizer.load(tokenizer)
    if given and Tokenizer.load(given).fingerprint != mine.fingerprint:
        raise InputError(f"tokenizer: {given} is not the one that {folder} was trained with, which {argument} names")
    return config if given else replace(config, data=replace(config.data, tokenizer=str(tokenizer)))


def with_teacher(config: RunConfig) -> RunConfig:
    """``config`` with the teacher's tokenizer, where there is a teacher.

    Raises:
        InputError: there is no such model, or its vocabulary or its context does not serve.
    """
    objective = config.objective
    if objective.teacher is None:
        return config
    folder, shape = language_model_folder(objective.teacher, "teacher")
    config = _with_tokenizer(config, folder, "teacher")
    if shape.context_length < config.model.context_length:
        raise InputError(f"context_length: the teacher {folder} reads {shape.context_length} tokens, the student "
                         f"{config.model.context_length}")  # fmt: skip
    size = Tokenizer.load(folder / "tokenizer.json").vocab_size
    if shape.vocab_size != size:
        raise InputError(f"teacher: {folder}: {size} tokens of the tokenizer do not match the model's vocab_size "
                         f"{shape.vocab_size}")  # fmt: skip
    return config


def with_pretrained(config: RunConfig) -> RunConfig:
    """``config`` with the shape of the model that ``pretrained`` names, fitted to the objective, and its tokenizer.

    The reference of dpo is the model without dropout, so dpo trains without it.

    Raises:
        InputError: there is no such model, it does not serve the objective, or another tokenizer is asked for.
    """
    objective = config.objective
    if objective.pretrained is None:
        return config
    folder = model_folder(objective.pretrained)
    shape = load_config(folder)
    config = _with_tokenizer(config, folder, "pretrained")
    # What the weights' shape is, the objective cannot change; only heads are added or left out.
    shape = shape.replace(heads=(), **({"dropout": 0.0} if objective.objective == "dpo" else {}))
    return replace(config, model=fit_model(objective, shape, given=("encoder", "decoder", "segments")))


def open_data(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Dataset | TaskDataset:
    """The data that ``config`` names, prepared in ``folder``.

    Raises:
        InputError: they cannot be used.
        OSError: ``folder`` cannot be written.
    """
    objective = config.objective
    if tokenizer_of(config.data) is None:
        check_training(config.model.vocab_size, objective.tokenizer_kind, objective.special_tokens)
    if not objective.kind.task:
        dataset = load_dataset(
            config.data, folder, vocab_size=config.model.vocab_size, say=say, special_tokens=objective.special_tokens,
            held_out=objective.held_out.split(",") if objective.held_out else (),
        )  # fmt: skip
        for role in ("cls", "sep", "mask") if objective.kind.encoder else ():
            dataset.tokenizer.special(role)
        return dataset
    examples = read_examples(objective.objective, config.data.data)
    if objective.held_out is None:
        train, validation = split_examples(examples)
    else:
        train, validation = examples, read_held_out(objective)
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        if objective.pretrained is None:
            tokenizer = tokenizer.with_special_tokens(objective.special_tokens)
    else:
        tokenizer = Tokenizer.train(
            texts(train), config.model.vocab_size, objective.tokenizer_kind, special_tokens=objective.special_tokens
        )
    name = " ".join(Path(path).name for path in config.data.data)
    if objective.kind.asks:
        return prepare_prompts(config, folder, name, (train, validation), tokenizer, say)
    return prepare_examples(folder, objective.objective, name, train, validation, tokenizer)


def read_held_out(objective: ObjectiveConfig) -> list[dict]:
    """The examples to score on; two Moses files stand with a comma between them."""
    return read_examples(objective.objective, (objective.held_out or "").split(","))


def reopen_data(config: RunConfig, folder: Path) -> Dataset | TaskDataset:
    """What :func:`open_data` left in ``folder``, checked."""
    return open_examples(folder) if config.objective.kind.task else open_dataset(folder)


def fitted(config: RunConfig, dataset: Dataset | TaskDataset) -> RunConfig:
    """``config`` with a budget, the vocabulary and the classes that the data turned out to have, and epochs as steps.

    Raises:
        InputError: the tokenizer is larger than the pretrained model's vocabulary.
    """
    size = dataset.tokenizer.vocab_size
    if config.objective.pretrained and size != config.model.vocab_size:
        raise InputError(
            f"pretrained: {size} tokens of the tokenizer do not match the model's vocab_size {config.model.vocab_size}"
        )
    training = config.with_budget().training
    if training.epochs is not None and training.steps is None:
        task = config.objective.kind.task
        seen = training.batch_size * (1 if task else config.model.context_length)
        training = replace(training, steps=max(1, math.ceil(training.epochs * len(dataset.train) / seen)))
    labels = dataset.labels if isinstance(dataset, TaskDataset) and config.objective.objective == "classify" else ()
    return replace(config, model=config.model.replace(vocab_size=size, labels=labels), training=training)


def new_model(config: RunConfig) -> Model:
    """A model with new weights, or with the pretrained ones and heads that those lack.

    Raises:
        InputError: the pretrained weights do not fit.
    """
    return with_weights(build_model(config.model), config, ALONE)


def with_weights(model: TrainedModel, config: RunConfig, ranks: Ranks) -> TrainedModel:
    """``model``, which ``ranks`` may have split, with the pretrained weights and adapters that ``config`` asks for.

    Heads that the pretrained model lacks keep what they have.

    Raises:
        InputError: the pretrained weights do not fit.
    """
    if config.objective.pretrained is None:
        return model
    path = model_folder(config.objective.pretrained) / "model.safetensors"
    weights = load_file(path)
    own = dict(model.named_parameters())
    # A head with another number of classes starts anew.
    taken = [name for name, value in weights.items() if name in own and value.shape == own[name].shape]
    body = ("encoder.", "decoder.", "blocks.", "token_embedding.")
    new = [name for name in own if name not in taken]
    missing = [name for name in new if name.startswith(body)]
    if missing:
        raise InputError(f"pretrained: {path} does not fit the model: {missing[0]} is missing or of another shape")
    with torch.no_grad():
        for name in taken:
            ranks.copy(own[name], weights[name])
    if config.objective.lora_rank:
        add_lora(model, config.objective.lora_rank, set(new))
    return model
