"""Presets of whole runs, and what they are made of: pooling, token dropout, label smoothing, epochs."""

import numpy as np
import pytest
import torch
from cells import dataset

from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.models import ModelConfig, build_model, load_model
from fastllm.models.cache import Encoded
from fastllm.tasks.translate import translate
from fastllm.training import train
from fastllm.training.config import RunConfig, TrainingConfig, build_run_config
from fastllm.training.objectives import ObjectiveConfig, make_objective
from fastllm.training.recipes import RECIPES
from fastllm.training.reports.progress import read_metrics
from fastllm.training.setup import fitted, open_data

SHAPE = dict(encoder="gru", decoder="none", heads=("classify",), context_length=32, num_layers=1, num_heads=2,
             hidden_size=16)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset("classify", tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_a_whole_run(name):
    config, recipe = build_run_config({}, "f", name), RECIPES[name]
    assert config.model == recipe.model
    assert config.training == TrainingConfig(**recipe.training)
    assert config.objective == ObjectiveConfig(**recipe.objective)
    # Its budget goes where another one is given, and nothing else of it does.
    shorter = build_run_config({"training": {"steps": 3}}, "f", name)
    assert shorter.training == TrainingConfig(**{**recipe.training, "epochs": None, "steps": 3})


@pytest.mark.usefixtures("short_runs")
def test_a_recipe_trains_and_translates(tmp_path):
    for side, case in (("en", str.lower), ("de", str.upper)):
        lines = [case(f"the {a} {b} sees {c}") for a in ("big", "red") for b in ("cat", "dog") for c in "abcdefgh"]
        for part, some in (("train", lines[2:]), ("val", lines[:2])):
            (tmp_path / f"{part}.{side}").write_text("\n".join(some) + "\n")
    held_out = f"{tmp_path / 'val.en'},{tmp_path / 'val.de'}"
    tables = {
        "data": {"data": [str(tmp_path / "train.en"), str(tmp_path / "train.de")]},
        "model": {"hidden_size": 32, "vocab_size": 320}, "objective": {"held_out": held_out},
        "training": {"steps": 20, "batch_size": 16, "eval_interval": 5},
    }  # fmt: skip
    result = train(build_run_config(tables, "f", "translate-small"), tmp_path / "run", quiet=True)
    scores = [line["validation_loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if "validation_loss" in line]  # fmt: skip
    assert result.validation_loss == min(scores) < scores[0]
    model, tokenizer = load_model(tmp_path / "run" / "model"), Tokenizer.load(tmp_path / "run" / "model/tokenizer.json")
    assert len(translate(model, tokenizer, ["the big cat sees a"], beams=2)) == 1


def test_a_recipe_is_under_what_is_asked_for():
    recipe = RECIPES["classify-small"]
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


def test_the_tokenizer_of_a_task_is_of_the_kind_asked_for(tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"{i % 2}\tword{i} other\n" for i in range(40)))
    tables = {"data": {"data": [str(tmp_path / "a.tsv")]}, "model": {"vocab_size": 300}}
    for kind, splits in (("word", 2), ("bpe", 1)):
        tables["objective"] = {"objective": "classify", "tokenizer_kind": kind}
        opened = open_data(build_run_config(tables, "f"), tmp_path / kind, print)
        assert len(opened.tokenizer.encode("word1 other")) >= splits
        assert (opened.tokenizer.encode("never") == [opened.tokenizer.special("unk")]) == (kind == "word")
    with pytest.raises(InputError, match="tokenizer_kind: objective causal is no task"):
        ObjectiveConfig("causal", tokenizer_kind="word")


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
    with pytest.raises(ValueError, match="pooling: expected one of first, mean, max"):
        ModelConfig(pooling="last")
