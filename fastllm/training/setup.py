"""What a run starts from: its data, its model, and the weights of another run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from ..config import InputError
from ..data import Dataset, Tokenizer, load_dataset, open_dataset
from ..models import Model, build_model
from ..tasks.read import read_examples
from ..tasks.store import TaskDataset, open_examples, prepare_examples, split_examples, texts
from .checkpoints.checkpoint import load_config
from .checkpoints.model_folder import model_folder
from .config import RunConfig
from .lora import add_lora
from .objectives.choose import ObjectiveConfig, fit_model


def with_pretrained(config: RunConfig) -> RunConfig:
    """``config`` with the shape of the model that ``pretrained`` names, fitted to the objective, and its tokenizer.

    Raises:
        InputError: there is no such model, it does not serve the objective, or another tokenizer is asked for.
    """
    objective = config.objective
    if objective.pretrained is None:
        return config
    folder = model_folder(objective.pretrained)
    shape = load_config(folder)
    tokenizer = folder / "tokenizer.json"
    given = config.data.tokenizer
    if given and Tokenizer.load(given).fingerprint != Tokenizer.load(tokenizer).fingerprint:
        raise InputError(f"tokenizer: {given} is not the one that {folder} was trained with")
    # What the weights' shape is, the objective cannot change; only heads are added or left out.
    model = fit_model(objective, shape.replace(heads=()), given=("encoder", "decoder", "segments"))
    return replace(config, model=model, data=replace(config.data, tokenizer=str(tokenizer)))


def open_data(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Dataset | TaskDataset:
    """The data that ``config`` names, prepared in ``folder``.

    Raises:
        InputError: they cannot be used.
        OSError: ``folder`` cannot be written.
    """
    objective = config.objective
    if not objective.kind.task:
        dataset = load_dataset(
            config.data, folder, vocab_size=config.model.vocab_size, say=say, special_tokens=objective.special_tokens
        )
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
    return prepare_examples(folder, objective.objective, name, train, validation, tokenizer)


def read_held_out(objective: ObjectiveConfig) -> list[dict]:
    """The examples to score on; two Moses files stand with a comma between them."""
    return read_examples(objective.objective, objective.held_out.split(","))


def reopen_data(config: RunConfig, folder: Path) -> Dataset | TaskDataset:
    """What :func:`open_data` left in ``folder``, checked."""
    return open_examples(folder) if config.objective.kind.task else open_dataset(folder)


def fitted(config: RunConfig, dataset: Dataset | TaskDataset) -> RunConfig:
    """``config`` with the vocabulary and the classes that the data turned out to have, and epochs as steps.

    Raises:
        InputError: the tokenizer is larger than the pretrained model's vocabulary.
    """
    size = dataset.tokenizer.vocab_size
    if config.objective.pretrained and size != config.model.vocab_size:
        raise InputError(
            f"pretrained: {size} tokens of the tokenizer do not match the model's vocab_size {config.model.vocab_size}"
        )
    training = config.training
    if training.epochs is not None and training.steps is None:
        task = config.objective.kind.task
        seen = training.batch_size * (1 if task else config.model.context_length)
        training = replace(training, steps=max(1, math.ceil(training.epochs * len(dataset.train) / seen)))
    labels = dataset.labels if config.objective.objective == "classify" else ()
    return replace(config, model=config.model.replace(vocab_size=size, labels=labels), training=training)


def new_model(config: RunConfig) -> Model:
    """A model with new weights, or with the pretrained ones and heads that those lack.

    Raises:
        InputError: the pretrained weights do not fit.
    """
    model = build_model(config.model)
    if config.objective.pretrained is None:
        return model
    if next(model.parameters()).is_meta:
        raise InputError("pretrained: weights cannot be read into a model that is split over ranks from its beginning")
    path = model_folder(config.objective.pretrained) / "model.safetensors"
    weights = load_file(path)
    own = model.state_dict()
    # A head with another number of classes starts anew.
    taken = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(taken, strict=False)
    body = ("encoder.", "decoder.", "blocks.", "token_embedding.")
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    missing = [name for name in own if name.startswith(body) and name not in taken and name not in tied]
    missing = [name for name in missing if name in dict(model.named_parameters(remove_duplicate=False))]
    if missing:
        raise InputError(f"pretrained: {path} does not fit the model: {missing[0]} is missing or of another shape")
    if config.objective.lora_rank:
        add_lora(model, config.objective.lora_rank, {name for name in own if name not in taken and name not in tied})
    return model
