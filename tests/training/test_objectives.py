"""Objectives: what is masked, paired, shifted and batched; every one on every model that serves it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from cells import cells, config_for, dataset, setting, tiny_run
from thorough import THOROUGH

import fastllm
from fastllm.config import InputError
from fastllm.data import Corpus, Tokenizer, prepare
from fastllm.data.batches import IGNORE
from fastllm.data.tokenizer import SPECIAL_TOKENS
from fastllm.models import ModelConfig, build_model
from fastllm.training.config import TrainingConfig, build_run_config
from fastllm.training.objectives import (
    OBJECTIVES,
    MaskedLM,
    ObjectiveConfig,
    PrefixLM,
    fit_model,
    make_objective,
    rows_of,
)
from fastllm.training.objectives.examples import POOL, ExampleOrder
from fastllm.training.objectives.masked import Masking, Pieces, Sentences, mask_tokens
from fastllm.training.optimizer import Optimizers
from fastllm.training.parallel.ranks import ALONE
from fastllm.training.step import StepSettings, train_step


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


# Every cell of the table


@pytest.mark.parametrize("cell", cells(), ids=" ".join)
def test_every_objective_learns_on_every_model_that_serves_it(cell, folder):
    first, last = tiny_run(*cell, folder)
    assert last < 0.9 * first


def of_kernels():
    """The cells; by default without those whose kernels other cells run in the same way."""
    for cell in cells():
        alike = cell[0] == "instruct" or (cell[0] in ("dpo", "distill") and cell[2] != "transformer")
        yield pytest.param(cell, marks=[THOROUGH] if alike else [], id=" ".join(cell))


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("cell", list(of_kernels()))
def test_gradients_on_the_kernels_are_those_on_the_eager_backend(cell, folder):
    objective, model = setting(*cell, folder)
    batch, results = rows_of(objective.batch(0), 2)[0], {}
    for backend in ("eager", "triton"):
        model.zero_grad()
        with fastllm.backend(backend):
            loss = sum(objective.losses(model, batch).values())
            loss.backward()
        results[backend] = [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    for a, b in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_a_function_of_seed_and_step_and_losses_of_parts_add_up(name, folder):
    data = dataset(name, folder)
    make = lambda seed, size: make_objective(config_for(name, folder), data, 32, size, seed)  # noqa: E731
    objective, again, other = make(3, 4), make(3, 4), make(4, 4)
    state = torch.get_rng_state()
    for step in (7, 0, 7):
        a, b, c = (o.batch(step) for o in (objective, again, other))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(a[key].shape != c[key].shape or not torch.equal(a[key], c[key]) for key in a)
        assert {len(tensor) for tensor in a.values()} == {4}
    assert torch.equal(state, torch.get_rng_state())
    whole, parts = objective.counts(a), [objective.counts(part) for part in rows_of(a, 3)]
    assert whole == {key: sum(part[key] for part in parts) for key in whole}


def test_windows_are_short_and_many_until_the_part_of_the_run_that_was_asked_for(folder):
    data = dataset("causal", folder)

    def batch(done, step=3, **given):
        return make_objective(ObjectiveConfig("causal", **given), data, 32, 4, 0).batch(step, done)

    for done, given, shape in (
        (0.0, {}, (16, 8)), (0.49, {}, (16, 8)), (0.5, {}, (4, 32)), (1.0, {}, (4, 32)),
        (0.2, {"short_windows": 0.2}, (4, 32)), (0.19, {"short_windows": 0.2}, (16, 8)),
        (0.0, {"short_windows": 0.0}, (4, 32)), (0.99, {"short_windows": 1.0}, (16, 8)),
        (0.0, {"pretrained": "a"}, (4, 32)), (0.0, {"pretrained": "a", "short_windows": 0.5}, (16, 8)),
    ):  # fmt: skip
        found = batch(done, **given)
        assert found["tokens"].shape == found["targets"].shape == shape
        assert torch.equal(found["tokens"][:, 1:], found["targets"][:, :-1])
    text = data.train.tokens[:]
    seen = torch.cat([batch(0.0, step)["tokens"] for step in range(len(text) // (16 * 8))])
    assert len(seen.unique(dim=0)) > 0.9 * len(seen)  # an epoch, and not the same quarter of each long window


def test_evaluation_is_repeatable_and_leaves_everything_alone(folder):
    for name, encoder, decoder in cells()[::3]:
        objective, model = setting(name, encoder, decoder, folder)
        model.train()
        state = torch.get_rng_state()
        results = [objective.evaluate(model, 3, "float32", limit) for limit in (0, 0, 2)]
        assert torch.equal(state, torch.get_rng_state())
        assert model.training
        assert results[0] == results[1]
        assert results[0].main in results[0].scores


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_score_does_not_depend_on_how_many_rows_are_computed_at_a_time(name, folder):
    encoder, decoder = next((encoder, decoder) for other, encoder, decoder in cells() if other == name)
    objective, model = setting(name, encoder, decoder, folder)
    for limit in (0, 5):
        whole, *others = (objective.evaluate(model, rows, "float32", limit) for rows in (16, 3, 1))
        for other in others:
            assert other.tokens == whole.tokens
            assert other.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.fixture(scope="module")
def words():
    text = "Unbelievably long extraordinary words, split into several pieces each; short ones not. " * 30
    tokenizer = Tokenizer.train(
        [text[:87] + "abcdefghijklmnopqrstuvwxyz"], 300, special_tokens=SPECIAL_TOKENS["masked"]
    )
    return tokenizer, np.array(tokenizer.encode(text))


def drawn(ids, groups, rng, probability=0.15, allowed=None, most=10**6):
    hidden = ids.copy()
    allowed = np.ones(len(ids), bool) if allowed is None else allowed
    how = Masking(probability, most, 299, np.arange(10, 290))
    positions, targets = mask_tokens(hidden, groups, allowed, how, np.random.default_rng(rng))
    return hidden, positions, targets


def test_masking_takes_its_part_of_which_80_10_10(words):
    ids = np.tile(words[1], 20)
    hidden, positions, targets = drawn(ids, np.arange(len(ids)), 0)
    assert len(positions) == round(0.15 * len(ids))
    assert (np.diff(positions) > 0).all()
    assert (targets == ids[positions]).all()
    rest = np.setdiff1d(np.arange(len(ids)), positions)
    assert (hidden[rest] == ids[rest]).all()
    masked = (hidden[positions] == 299).mean()
    stayed = (hidden[positions] == targets).mean()
    # Five standard deviations of the binomial counts.
    assert masked == pytest.approx(0.8, abs=5 * (0.16 / len(positions)) ** 0.5)
    assert stayed == pytest.approx(0.1 + 0.1 / 280, abs=5 * (0.09 / len(positions)) ** 0.5)


def test_the_number_of_masked_tokens_is_the_nearest_to_the_part(words):
    counts = [len(drawn(words[1][:count], np.arange(count), 0)[1]) for count in (1, 9, 11, 17, 100)]
    assert counts == [1, 1, 2, 3, 15]


def test_whole_words_are_masked_whole(words):
    tokenizer, ids = words
    groups = Pieces(tokenizer).words(ids)
    pieces = [tokenizer.decode(ids[groups == g]).strip() for g in range(12)]
    assert pieces[:4] == ["Unbelievably", "long", "extraordinary", "words"]
    assert np.bincount(groups).max() > 2
    _, positions, _ = drawn(ids, groups, 1)
    chosen = set(groups[positions])
    assert set(np.flatnonzero(np.isin(groups, list(chosen)))) == set(positions)
    assert 0.1 < len(positions) / len(ids) <= 0.16


def test_masks_keep_to_what_is_allowed_and_to_the_most():
    ids = np.arange(20, 60)
    allowed = np.arange(40) % 2 == 0
    _, positions, _ = drawn(ids, np.arange(40), 2, 0.5, allowed)
    assert set(positions) <= set(np.flatnonzero(allowed))
    assert len(positions) == 10
    assert len(drawn(ids, np.arange(40), 2, 0.5, allowed, most=3)[1]) == 3
    assert len(drawn(ids, np.zeros(40, int), 2, 0.05, most=3)[1]) == 3  # one word, longer than all that is wanted
    assert len(drawn(ids, np.arange(40), 2, 0.5, np.zeros(40, bool))[1]) == 0


def test_pairs_follow_each_other_or_come_from_another_document(folder):
    data = dataset("mlm+nsp", folder)
    objective = MaskedLM(data, 32, 64, 0, masking=False, pairs=True)
    ids, sentences = np.asarray(data.train.tokens), Sentences(data.train)
    joined = " ".join(map(str, ids))
    labels = []
    for step in range(4):
        batch = objective.batch(step)
        for row, length, segments, label in zip(
            batch["tokens"].tolist(), batch["lengths"].tolist(), batch["segments"], batch["next"].tolist(), strict=True
        ):
            row = row[:length]
            first = row.index(objective.sep)
            a, b = row[1:first], row[first + 1 : -1]
            assert row[0] == objective.cls
            assert row[-1] == objective.sep
            assert segments[:length].tolist() == [0] * (first + 1) + [1] * (len(b) + 1)
            follows = " ".join(map(str, a + b)) in joined
            assert follows == (label == 0)
            labels.append(label)
    assert 0.35 < np.mean(labels) < 0.65
    assert sentences.documents == 6


def test_what_follows_a_documents_last_sentence_is_from_elsewhere(tmp_path):
    corpus = Corpus("short", ["One sentence.", "Another one.", "A third."], ["Held out.", "Twice."])
    data = prepare(corpus, tmp_path, vocab_size=300, special_tokens=SPECIAL_TOKENS["masked"])
    objective = MaskedLM(data, 32, 16, 0, masking=False, pairs=True)
    assert (objective.batch(0)["next"] == 1).all()


def test_next_sentences_can_be_learnt(tmp_path):
    """Two documents of unlike words: whether A and B have the same is not to be seen in either alone."""
    source = random.Random(0)

    def text(words, count):
        return " ".join(" ".join(source.choice(words) for _ in range(4)).capitalize() + "." for _ in range(count))

    words = ["red", "blue", "green", "cat", "dog"], ["tree", "runs", "over", "under", "the"]
    corpus = Corpus("two", [text(some, 60) for some in words], [text(some, 40) for some in words])
    config = ObjectiveConfig("nsp")
    data = prepare(corpus, tmp_path, vocab_size=300, special_tokens=config.special_tokens)
    shape = ModelConfig(
        vocab_size=data.tokenizer.vocab_size, context_length=32, num_layers=1, num_heads=2, hidden_size=32
    )
    torch.manual_seed(0)
    model = build_model(fit_model(config, shape))
    objective, optimizers = make_objective(config, data, 32, 32, 0), Optimizers(model, TrainingConfig())
    for step in range(100):
        train_step(objective, model, optimizers, objective.batch(step), StepSettings(32, 1.0, "float32"))
    scores = objective.evaluate(model, 32, "float32", 0).scores
    assert scores["nsp_accuracy"] > 0.95, scores


def test_masked_targets_are_where_the_positions_say(folder):
    data = dataset("mlm", folder)
    objective = MaskedLM(data, 32, 16, 0)
    plain = MaskedLM(data, 32, 16, 0, masking=False)
    batch, shown = objective.batch(5), plain.batch(5)
    assert torch.equal(batch["lengths"], shown["lengths"])
    there = batch["targets"] != IGNORE
    rows = torch.nonzero(there)[:, 0]
    assert torch.equal(shown["tokens"][rows, batch["positions"][there]], batch["targets"][there])
    assert there.sum(1).min() >= 1
    assert not torch.equal(batch["tokens"], objective.batch(5 + len(objective._train))["tokens"])  # drawn anew


def test_a_single_document_has_no_pairs(tmp_path):
    corpus = Corpus("one", ["One sentence. Another one. A third."], ["Held out. Twice."])
    data = prepare(corpus, tmp_path, vocab_size=300, special_tokens=SPECIAL_TOKENS["masked"])
    with pytest.raises(InputError, match="at least two documents in the training text"):
        MaskedLM(data, 32, 4, 0, pairs=True)
    with pytest.raises(InputError, match="at least 11 tokens, got 8"):
        MaskedLM(data, 8, 4, 0)


# Prefixes and examples


def test_only_what_follows_the_prefix_is_predicted(folder):
    objective = PrefixLM(dataset("prefix", folder), 32, 16, 0)
    batch = objective.batch(2)
    assert batch["prefix"].min() >= 1
    assert batch["prefix"].max() <= 16
    for row, prefix in zip(batch["targets"], batch["prefix"].tolist(), strict=True):
        assert (row[: prefix - 1] == IGNORE).all()
        assert (row[prefix - 1 :] != IGNORE).all()


def test_every_example_comes_once_an_epoch_beside_others_of_its_length():
    lengths = np.random.default_rng(0).integers(1, 100, (640, 2))
    order = ExampleOrder(lengths, 4, "key")
    seen = np.concatenate([order(step) for step in range(160)])
    assert sorted(seen) == list(range(640))
    # What a batch is padded to: the longer side of its pairs. Measured 2.2, and 21 where the sum of both sides decides.
    longest = lengths.max(1)
    spread = np.mean([np.ptp(longest[order(step)]) for step in range(POOL)])
    assert spread < 5
    assert (order(37) == ExampleOrder(lengths, 4, "key")(37)).all()


@pytest.mark.parametrize("unanswerable", [False, True])
def test_no_answer_is_given_where_some_questions_have_none(folder, monkeypatch, unanswerable):
    objective, model = setting("answer", "transformer", "none", folder)
    examples = [dict(example) for example in objective.dataset.validation.examples]
    if unanswerable:
        examples[0]["answers"] = []
    held_out = replace(objective.dataset.validation, examples=examples)
    monkeypatch.setattr(objective, "dataset", replace(objective.dataset, validation=held_out))
    # Both logits of a window's first token are far above all others.
    logits = lambda encoded: (encoded.states[..., 0] * 0 - 9.0).index_fill(1, torch.tensor([0]), 9.0)  # noqa: E731
    monkeypatch.setattr(model, "span_logits", lambda encoded: (logits(encoded), logits(encoded)))
    scores = objective.evaluate(model, 4, "float32", 0).scores
    assert scores.get("unanswerable_exact_match") == (1.0 if unanswerable else None)
    assert scores["exact_match"] == (1 / len(examples) if unanswerable else 0.0)


def test_the_model_gets_what_the_objective_needs():
    config = build_run_config({"objective": {"objective": "mlm+nsp"}}, "here")
    assert (config.model.encoder, config.model.decoder, config.model.heads) == ("transformer", "none", ("mlm", "nsp"))
    assert config.model.segments == 2
    again = build_run_config(
        {"objective": {"objective": "mlm+nsp"}, "model": {"encoder": "gru", "decoder": "none", "hidden_size": 64}}, "x"
    )
    assert again.model.encoder == "gru"
    with pytest.raises(InputError, match="here: decoder: objective mlm needs none, got lstm"):
        build_run_config({"objective": {"objective": "mlm"}, "model": {"decoder": "lstm"}}, "here")
    with pytest.raises(InputError, match="decoder: objective prefix needs transformer, got gru"):
        build_run_config({"objective": {"objective": "prefix"}, "model": {"decoder": "gru"}}, "here")
    with pytest.raises(InputError, match="encoder: objective seq2seq needs transformer, lstm or gru, got none"):
        fit_model(ObjectiveConfig("seq2seq"), ModelConfig(), ("encoder",))
    with pytest.raises(InputError, match="objective: expected one of causal, prefix, mlm"):
        build_run_config({"objective": {"objective": "clm"}}, "here")


def test_a_part_with_targets_for_every_term_stands_in_for_those_that_lack_one():
    class TwoTerms:
        def counts(self, batch):
            return {name: int((batch[name] != IGNORE).sum()) for name in ("words", "next")}

    words, following = (torch.full((6, 2), IGNORE) for _ in range(2))
    words[:4], following[2] = 7, 1  # of parts of two rows the second alone has both
    batch = {"words": words, "next": following}
    found = ALONE.stand_in(TwoTerms(), batch, 2)
    assert all(torch.equal(found[name], batch[name][2:4]) for name in batch)
