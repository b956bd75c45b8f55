"""Greedy and beam search against every continuation there is."""

import itertools

import pytest
import torch
from conftest import DEVICE

from fastllm.generate.search import beam_search, greedy
from fastllm.models import ModelConfig, build_model

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

VOCABULARY, STOP, LONGEST = 4, 0, 4
SHAPE = dict(vocab_size=VOCABULARY, context_length=12, num_layers=1, num_heads=2, hidden_size=16)


def peaked(**kinds):
    """A model whose next token is far from uniform, and far from certain."""
    torch.manual_seed(5)
    model = build_model(ModelConfig(**SHAPE, **kinds)).to(DEVICE).eval()
    for p in model.parameters():
        p.data.mul_(4).add_(torch.randn_like(p) * 0.3)
    return model


def everything(model, start, memory, penalty):
    """(score, continuation) of all sequences up to LONGEST tokens, by the uncached model, best first."""
    found = []
    for length in range(LONGEST + 1):
        for path in itertools.product(range(1, VOCABULARY), repeat=length):
            ended = [*path, STOP] if length < LONGEST else list(path)
            tokens = torch.tensor([[*start, *ended]], device=DEVICE)
            with torch.no_grad():
                logits = model(tokens, memory) if memory is not None else model(tokens)
            steps = logits[0, len(start) - 1 : -1].double().log_softmax(-1)
            score = steps.gather(-1, tokens[0, len(start) :, None]).sum().item() / len(ended) ** penalty
            found.append((score, list(path)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize(
    "kinds", [dict(), dict(decoder="gru"), dict(encoder="lstm"), dict(encoder="gru", decoder="lstm")]
)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_what_exhaustive_search_finds(kinds, penalty):
    model = peaked(**kinds)
    source, lengths = torch.tensor([[1, 2, 3, 1], [2, 2, 0, 0]], device=DEVICE), torch.tensor([4, 2], device=DEVICE)
    memory = model.encode(source, lengths) if "encoder" in kinds else None
    start = torch.tensor([[1], [3]], device=DEVICE)
    beams = (VOCABULARY - 1) ** LONGEST
    found = beam_search(
        model, start, memory=memory, beams=beams, max_new_tokens=LONGEST, stop_token=STOP, length_penalty=penalty
    )
    for row in range(2):
        own = None
        if memory is not None:
            own = type(memory)(memory.states[row : row + 1], memory.mask[row : row + 1])
        expected = everything(model, start[row].tolist(), own, penalty)[:10]
        assert [hypothesis.tokens for hypothesis in found[row][:10]] == [path for _, path in expected]
        assert [h.score for h in found[row][:10]] == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_a_row_does_not_depend_on_its_batch_and_a_prompt_may_be_longer():
    model = peaked()
    starts = torch.tensor([[1, 2], [3, 1], [2, 2]], device=DEVICE)
    options = dict(beams=3, max_new_tokens=6, stop_token=STOP)
    together = beam_search(model, starts, **options)
    for row in range(3):
        alone = beam_search(model, starts[row : row + 1], **options)[0]
        assert [h.tokens for h in alone] == [h.tokens for h in together[row]]


def test_greedy_takes_the_likeliest_token_of_the_uncached_model():
    model = peaked(encoder="transformer")
    memory = model.encode(torch.tensor([[1, 2, 3], [3, 3, 1]], device=DEVICE))
    found = greedy(model, torch.tensor([[0], [0]], device=DEVICE), memory=memory, max_new_tokens=7, stop_token=STOP)
    for row in range(2):
        own, ids = type(memory)(memory.states[row : row + 1], None), [0]
        while len(ids) < 8:
            token = int(model(torch.tensor([ids], device=DEVICE), own)[0, -1].argmax())
            if token == STOP:
                break
            ids.append(token)
        assert found[row] == ids[1:]


def test_the_context_ends_a_search_and_bad_arguments_are_named():
    model = peaked()
    start = torch.ones(1, 10, dtype=torch.long, device=DEVICE)
    assert all(len(h.tokens) <= 3 for h in beam_search(model, start, beams=2, max_new_tokens=50, stop_token=STOP)[0])
    for options, message in (
        ({"beams": 0}, "beams must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, start, **{"max_new_tokens": 5, "stop_token": STOP, **options})
    for options, message in (
        ({"beams": True}, "beams must be a whole number"),
        ({"stop_token": True}, "stop_token must be a whole number"),
        ({"length_penalty": "1"}, "length_penalty must be a number"),
        ({"length_penalty": None}, "length_penalty must be a number"),
    ):
        with pytest.raises(TypeError, match=message):
            beam_search(model, start, **{"max_new_tokens": 5, "stop_token": STOP, **options})
    for search in (beam_search, greedy):
        with pytest.raises(TypeError, match="model must be a language model, got NoneType"):
            search(None, start, max_new_tokens=5, stop_token=STOP)
    with pytest.raises(ValueError, match="at least one token each"):
        greedy(model, start[:, :0], max_new_tokens=5, stop_token=STOP)
