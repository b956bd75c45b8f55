"""Batches of windows, and the windows of an evaluation."""

import numpy as np
import pytest
import torch
from prose import prose

from fastllm.config import InputError
from fastllm.data import (
    Batches,
    Tokenizer,
    evaluation_batches,
    evaluation_windows,
    open_token_file,
    write_token_file,
)
from fastllm.data.batches import permute


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([prose(50)], 300)


@pytest.fixture
def tokens(tokenizer, tmp_path):
    write_token_file(tmp_path / "t.bin", [prose(60)], tokenizer)
    return open_token_file(tmp_path / "t.bin", tokenizer)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_permutation_element_by_element(size):
    whole = permute(np.arange(size), size, key=3)
    assert sorted(whole) == list(range(size))
    assert [int(permute(np.array([i]), size, key=3)[0]) for i in range(size)] == whole.tolist()
    if size > 60:
        assert whole.tolist() != permute(np.arange(size), size, key=4).tolist()


def test_every_epoch_visits_every_window_once_in_an_order_and_at_an_offset_of_its_own(tokens):
    batches = Batches(tokens, context_length=16, batch_size=1, seed=0)
    epochs = []
    for epoch in range(3):
        starts = np.concatenate([batches.starts(epoch * batches.windows + i) for i in range(batches.windows)])
        assert len(set(starts // 16)) == batches.windows  # an offset below 16 shifts all alike
        assert len(set(starts % 16)) == 1
        assert starts.min() >= 0
        assert starts.max() + 17 <= len(tokens)
        epochs.append(tuple(starts))
    assert len(set(epochs)) == 3


def test_a_batch_is_a_pure_function_of_data_seed_and_step(tokens, tokenizer, tmp_path):
    def at(step, seed=0, source=tokens):
        return Batches(source, 16, 4, seed)(step)

    batches = Batches(tokens, 16, 4, 0)
    for step in (0, 7, 3, 1000000, 7):
        for ours, fresh in zip(batches(step), at(step), strict=True):
            assert torch.equal(ours, fresh)
    assert not torch.equal(at(0)[0], at(1)[0])
    assert not torch.equal(at(0)[0], at(0, seed=1)[0])
    inputs, targets = at(5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    state = torch.get_rng_state()
    at(0)
    assert torch.equal(state, torch.get_rng_state())


def test_the_samples_do_not_depend_on_how_they_are_grouped(tokens):
    small, large = Batches(tokens, 16, 2, 0), Batches(tokens, 16, 6, 0)
    assert np.concatenate([small.starts(i) for i in range(30)]).tolist() == (
        np.concatenate([large.starts(i) for i in range(10)]).tolist()
    )


def test_the_smallest_text_that_fits_is_taken_and_a_shorter_one_refused(tokens):
    n = len(tokens)
    inputs, _ = Batches(tokens, n - 1, 3, 0)(9)
    assert inputs.tolist() == [tokens.tokens[:-1].tolist()] * 3
    with pytest.raises(InputError, match=f"context_length: the training text has {n:,} tokens"):
        Batches(tokens, n, 3, 0)


@pytest.mark.parametrize("count", [2, 3, 17, 18, 33, 100, 1000])
@pytest.mark.parametrize("stride", [1, 8, 16])
def test_evaluation_scores_every_token_once_with_enough_context(count, stride):
    scored = []
    for inputs, targets in evaluation_batches(np.arange(count), 16, stride, batch_size=3):
        counted = targets != -100
        assert torch.equal(inputs[counted] + 1, targets[counted])
        scored += targets[counted].tolist()
    assert scored == list(range(1, count))
    for window in evaluation_windows(count, 16, stride)[1:]:
        assert window.length == 16
        assert window.skip >= 16 - stride


@pytest.mark.parametrize("name", ["context_length", "batch_size", "stride", "limit"])
@pytest.mark.parametrize("value", [None, "8", 1.5, True, -1, 0])
def test_counts_that_are_none_are_named(tokens, name, value):
    wrong = pytest.raises((TypeError, ValueError), match=f"{name} must be (a whole number|at least)")
    if name in ("context_length", "batch_size"):
        with wrong:
            Batches(tokens, **{"context_length": 8, "batch_size": 2, "seed": 0, name: value})
    if name == "limit" and value == 0:  # all windows
        return
    with wrong:
        list(evaluation_batches(np.arange(50), **{"context_length": 8, "stride": 4, "batch_size": 2, name: value}))
