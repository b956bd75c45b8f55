"""A model that is evaluated for a while comes back with each module's own mode."""

import pytest
import torch

from fastllm.generate import beam_search, generate, greedy
from fastllm.models import Transformer, TransformerConfig
from fastllm.models.mode import evaluation_mode


def model():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=20, context_length=12, hidden_size=16, num_heads=2, num_layers=2)
    result = Transformer(config)
    result.blocks[0].eval()
    return result


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def drawn(model):
    return list(generate(model, [1, 2], max_new_tokens=2, seed=0))


def likeliest(model):
    return greedy(model, torch.tensor([[1]]), max_new_tokens=2, stop_token=0)


def searched(model):
    return beam_search(model, torch.tensor([[1]]), beams=2, max_new_tokens=2, stop_token=0)


@pytest.mark.parametrize("call", [drawn, likeliest, searched])
def test_a_frozen_part_stays_in_evaluation_mode(call):
    one = model()
    before = modes(one)
    assert set(before.values()) == {True, False}
    call(one)
    assert modes(one) == before


def test_the_modes_come_back_when_the_block_raises():
    one = model()
    before, within = modes(one), {}

    def fail():
        with evaluation_mode(one):
            within.update(modes(one))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(within.values())
    assert modes(one) == before
