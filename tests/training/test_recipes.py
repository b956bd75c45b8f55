"""Presets of whole runs, and what they are made of: pooling, token dropout, label smoothing, epochs."""

import numpy as np
import pytest
import torch
from cells import dataset

from fastllm.config import InputError
from fastllm.models import ModelConfig, build_model
from fastllm.models.cache import Encoded
from fastllm.training.config import RunConfig, TrainingConfig, build_run_config
from fastllm.training.objectives import ObjectiveConfig, make_objective
from fastllm.training.recipes import RECIPES
from fastllm.training.setup import fitted

SHAPE = dict(encoder="gru", decoder="none", heads=("classify",), context_length=32, num_layers=1, num_heads=2,
             hidden_size=16)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset("classify", tmp_path_factory.mktemp("recipes"))


def test_a_recipe_is_under_what_is_asked_for():
    config = build_run_config({}, "f", "classify-small")
    recipe = RECIPES["classify-small"]
    assert config.model == recipe.model
    assert config.training == TrainingConfig(**recipe.training)
    assert config.objective == ObjectiveConfig(**recipe.objective)
    tables = {
        "model": {"preset": "classify-small", "hidden_size": 64}, "training": {"lr": 1e-3, "steps": 7},
        "objective": {"token_dropout": 0.0},
    }  # fmt: skip
    config = build_run_config(tables, "f")
    assert (config.model.hidden_size, config.model.encoder) == (64, "gru")
    assert (config.training.steps, config.training.epochs, config.training.lr) == (7, None, 1e-3)
    assert config.training.batch_size == recipe.training["batch_size"]
    assert (config.objective.token_dropout, config.objective.objective) == (0.0, "classify")
    with pytest.raises(InputError, match="preset: this one is for objective classify, not for seq2seq"):
        build_run_config({"objective": {"objective": "seq2seq"}}, "f", "classify-small")
    with pytest.raises(InputError, match=r"preset: expected one of tiny, .*classify-small; got 'large'"):
        build_run_config({}, "f", "large")


def test_epochs_become_steps_of_the_data(data):
    training = TrainingConfig(epochs=2.5, batch_size=8)
    assert training.with_budget().max_seconds is None
    config = RunConfig(objective=ObjectiveConfig("classify"), model=ModelConfig(**SHAPE), training=training)
    assert fitted(config, data).training.steps == -(-5 * len(data.train) // 16)
    given = RunConfig(objective=config.objective, model=config.model, training=TrainingConfig(epochs=2.5, steps=3))
    assert fitted(given, data).training.steps == 3


def test_token_dropout_masks_a_part_of_the_text_anew_in_every_step(data):
    make = lambda part: make_objective(ObjectiveConfig("classify", token_dropout=part), data, 32, 8, 0)  # noqa: E731
    plain, dropped, again = make(0.0), make(0.3), make(0.3)
    mask, hidden, inside = data.tokenizer.special("mask"), 0, 0
    for step in range(40):
        a, b = plain.batch(step), dropped.batch(step)
        assert torch.equal(b["tokens"], again.batch(step)["tokens"])
        changed = a["tokens"] != b["tokens"]
        assert set(b["tokens"][changed].tolist()) <= {mask}
        place = torch.arange(a["tokens"].shape[1])
        text = (place > 0) & (place < a["lengths"][:, None] - 1)
        assert not (changed & ~text).any()
        assert torch.equal(a["labels"], b["labels"])
        hidden, inside = hidden + int(changed.sum()), inside + int(text.sum())
    # Six standard deviations of a binomial.
    assert abs(hidden - 0.3 * inside) < 6 * np.sqrt(0.21 * inside)
    # What is scored is whole.
    assert torch.equal(plain.validation.batch([0, 1])["tokens"], dropped.validation.batch([0, 1])["tokens"])
    with pytest.raises(InputError, match="token_dropout: is for objective classify, not for seq2seq"):
        ObjectiveConfig("seq2seq", token_dropout=0.1)


def test_labels_are_smoothed_in_training_alone(data, tmp_path):
    objective = make_objective(ObjectiveConfig("classify", label_smoothing=0.2), data, 32, 8, 0)
    model = build_model(ModelConfig(**SHAPE, vocab_size=data.tokenizer.vocab_size, labels=data.labels))
    batch = objective.batch(0)
    logits = model.class_logits(model.encode(batch["tokens"], batch["lengths"]))
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
        torch.testing.assert_close(objective.losses(model.train(training), batch)["loss"], expected)
    assert make_objective(ObjectiveConfig("classify"), data, 32, 8, 0).label_smoothing == 0.0
    pairs = dataset("seq2seq", tmp_path)
    assert make_objective(ObjectiveConfig("seq2seq"), pairs, 32, 4, 0).label_smoothing == 0.1


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("encoder", ["gru", "transformer"])
def test_a_text_is_pooled_without_its_padding(encoder, pooling):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**SHAPE, "encoder": encoder, "pooling": pooling}, vocab_size=50)).eval()
    assert model.pooler is None
    tokens, lengths = torch.randint(50, (3, 9)), torch.tensor([9, 4, 1])
    together = model.class_logits(model.encode(tokens, lengths))
    for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
        alone = model.encode(ids[None, :length])
        torch.testing.assert_close(together[row], model.class_logits(alone)[0], rtol=1e-4, atol=1e-6)
        expected = alone.states[0].mean(0) if pooling == "mean" else alone.states[0].max(0).values
        torch.testing.assert_close(together[row], model.classifier(expected), rtol=1e-4, atol=1e-6)
    padded = Encoded(torch.full((1, 2, 16), 5.0), torch.tensor([[True, False]]))
    torch.testing.assert_close(model.class_logits(padded)[0], model.classifier(torch.full((16,), 5.0)))
    with pytest.raises(ValueError, match="pooling must be one of first, mean, max"):
        ModelConfig(pooling="last")
