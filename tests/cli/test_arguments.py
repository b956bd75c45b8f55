"""Bad arguments of the Python interface: an error that names them, before any work."""

from functools import partial

import pytest
import torch
from cells import SHAPE
from prose import prose

from fastllm.config import InputError
from fastllm.data import Corpus, DataConfig, Tokenizer, prepare
from fastllm.data.clean import CleanConfig
from fastllm.data.pipeline import PipelineConfig
from fastllm.data.tokenizer import SPECIAL_TOKENS
from fastllm.generate import beam_search, generate, greedy
from fastllm.models import ModelConfig, build_model
from fastllm.tasks.answer import answers
from fastllm.tasks.classify import classify
from fastllm.tasks.metrics import confusion, f1_macro, squad_scores
from fastllm.tasks.translate import translate
from fastllm.training import TrainingConfig
from fastllm.training.objectives import ObjectiveConfig


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (TrainingConfig, {"lr": -1.0}, "lr: expected more than 0, got -1"),
        (TrainingConfig, {"lr": "fast"}, "lr: expected float, got 'fast'"),
        (TrainingConfig, {"optimizer": "sgd"}, "optimizer: expected one of muon, adamw; got 'sgd'"),
        (TrainingConfig, {"dtype": "int8"}, "dtype: expected one of auto"),
        (TrainingConfig, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (TrainingConfig, {"micro_batch_size": 0}, "micro_batch_size: expected at least 1, got 0"),
        (TrainingConfig, {"steps": 1.5}, "steps: expected int, got 1.5"),
        (TrainingConfig, {"lr": float("nan")}, "lr: expected a finite number"),
        (ObjectiveConfig, {"objective": "clm"}, "objective: expected one of causal"),
        (ObjectiveConfig, {"objective": "mlm", "mask_probability": 2.0}, "mask_probability: expected less than 1"),
        (DataConfig, {"data": "text.txt"}, "data: expected a list, got 'text.txt'"),
        (CleanConfig, {"extractor": "best"}, "extractor: expected one of fast"),
        (PipelineConfig, {"similarity": 2}, "similarity: expected at most 1"),
    ],
)
def test_settings_are_checked_without_a_command_line(settings, values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        settings(**values)


def test_settings_take_paths_lists_and_whole_numbers(tmp_path):
    assert DataConfig(data=[tmp_path]).data == (str(tmp_path),)
    assert ObjectiveConfig(held_out=tmp_path).held_out == str(tmp_path)
    assert repr(TrainingConfig(lr=1).lr) == "1.0"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": True}, "vocab_size: expected int, got True"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a finite number"),
        ({"norm_eps": 10**400}, "norm_eps: expected a finite number"),
        ({"rotary_base": float("inf")}, "rotary_base: expected a finite number"),
        ({"labels": "ab"}, "labels: expected a list, got 'ab'"),
        ({"labels": ("a", "a")}, "labels: expected no repetitions"),
        ({"heads": 5}, "heads: expected a list, got 5"),
    ],
)
def test_a_models_shape_is_of_numbers_and_names(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer.train([prose(30)], 300, special_tokens=SPECIAL_TOKENS["all"])
    shape = SHAPE.replace(vocab_size=tokenizer.vocab_size)
    found = {"write": build_model(shape), "translate": build_model(shape.replace(encoder="gru"))}
    for head in ("classify", "span"):
        found[head] = build_model(shape.replace(encoder="conv", decoder="none", heads=(head,)))
    return tokenizer, found


@pytest.mark.parametrize("rows", [0, -1, 1.5, "all"])
def test_tasks_refuse_rows_that_are_no_number_of_rows(parts, rows):
    tokenizer, models = parts
    for task, model, asked in (
        (translate, "translate", ["fox"]), (classify, "classify", ["fox"]), (answers, "span", [("fox", "dog")]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="rows: expected a whole number of at least 1"):
            task(models[model], tokenizer, asked, rows=rows)


@pytest.mark.parametrize(("task", "model"), [(translate, "translate"), (classify, "classify"), (answers, "span")])
def test_tasks_refuse_one_text_and_another_tasks_model(parts, task, model):
    tokenizer, models = parts
    with pytest.raises(TypeError, match="texts: expected a list of texts, got one text"):
        task(models[model], tokenizer, "fox")
    with pytest.raises(TypeError, match=r"model: expected one with .*, got Transformer"):
        task(models["write"], tokenizer, [])


def test_searches_name_what_they_cannot_take(parts):
    _, models = parts
    model, start = models["write"], torch.tensor([[1]])
    size = model.config.vocab_size
    for search in (greedy, beam_search, lambda model, start, **options: generate(model, [1], **options)):
        for token in (-1, size):
            with pytest.raises(ValueError, match=f"stop_token must be in the vocabulary of {size}, got {token}"):
                search(model, start, max_new_tokens=2, stop_token=token)
        with pytest.raises(TypeError, match="stop_token must be a whole number, got 'x'"):
            search(model, start, max_new_tokens=2, stop_token="x")
        with pytest.raises(TypeError, match=r"max_new_tokens must be a whole number, got 2\.0"):
            search(model, start, max_new_tokens=2.0, stop_token=0)
    with pytest.raises(TypeError, match="start must be a tensor, got list"):
        greedy(model, [[1]], max_new_tokens=2, stop_token=0)
    with pytest.raises(TypeError, match=r"beams must be a whole number, got 2\.5"):
        beam_search(model, start, beams=2.5, max_new_tokens=2, stop_token=0)
    with pytest.raises(TypeError, match="model must be a language model, got Encoder"):
        generate(models["span"], [1])


def test_tokenizers_take_texts(parts):
    tokenizer, _ = parts
    train = partial(Tokenizer.train, vocab_size=300)
    for documents, message in (("one text", "got one text"), ([None], "got NoneType"), ([b"text"], "got bytes")):
        with pytest.raises(InputError, match=f"documents: expected .*{message}"):
            train(documents)
    with pytest.raises(InputError, match="special_tokens: expected a list of names, got one text"):
        train(["text"], special_tokens="<end>")
    with pytest.raises(InputError, match=r"vocab_size: expected a whole number, got 300\.5"):
        train(["text"], vocab_size=300.5)
    with pytest.raises(TypeError, match="texts: expected a list of texts, got one text"):
        tokenizer.encode_batch("text")
    with pytest.raises(ValueError, match="ids: expected none below 0, got -1"):
        tokenizer.decode([3, -1])
    assert tokenizer.token(-1) == ""


def test_scores_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="labels and predicted: expected as many of both, got 2 and 1"):
        f1_macro([0, 1], [0], 2)
    with pytest.raises(ValueError, match="labels: expected numbers from 0 to 1, got -1 to 0"):
        confusion([-1, 0], [0, 0], 2)
    with pytest.raises(ValueError, match="labels: expected at least one"):
        f1_macro([], [], 2)
    with pytest.raises(ValueError, match="given: expected at least one answer"):
        squad_scores([], [])


def test_a_corpus_without_a_part_is_refused(tmp_path):
    with pytest.raises(InputError, match="corpus: x: expected documents to train on and to validate, got 1 and 0"):
        prepare(Corpus("x", ["text"], []), tmp_path / "data", vocab_size=300)
    with pytest.raises(InputError, match="shard_tokens: expected at least 1, got 0"):
        prepare(Corpus("x", ["text"], ["text"]), tmp_path / "data", vocab_size=300, shard_tokens=0)
    assert not (tmp_path / "data").exists()
