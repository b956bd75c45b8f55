"""Answers, classes and translations by small models."""

import pytest
import torch
from task_text import TEXT

from fastllm.models import Encoder, EncoderDecoder, ModelConfig
from fastllm.tasks.answer import MAX_TOKENS, _likeliest, answers
from fastllm.tasks.classify import classify
from fastllm.tasks.features import windows
from fastllm.tasks.translate import translate


def test_the_longest_span_has_as_many_tokens_as_its_bound():
    offsets = [(place, place + 1) for place in range(MAX_TOKENS + 1)]
    starts, ends = torch.zeros(2, len(offsets))
    starts[0], ends[MAX_TOKENS - 1], ends[MAX_TOKENS] = 20.0, 20.0, 30.0
    place = _likeliest(starts, ends, offsets)
    assert (place.first, place.last) == (offsets[0], offsets[MAX_TOKENS - 1])


def test_the_best_span_is_the_best_of_all_windows(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=24, num_layers=1, num_heads=2, hidden_size=16, segments=2,
        encoder="transformer", decoder="none", heads=("span",),
    )  # fmt: skip
    model = Encoder(config).eval()
    for p in model.requires_grad_(False).parameters():
        p.mul_(5)
    (found,) = answers(model, tokenizer, [("What?", TEXT)], rows=3)
    best = (-float("inf"), None)
    for window in windows("What?", TEXT, tokenizer, 24):
        segments = torch.tensor([window["segments"]])
        starts, ends = model.span_logits(model.encode(torch.tensor([window["tokens"]]), None, segments))
        starts, ends = starts[0].log_softmax(-1), ends[0].log_softmax(-1)
        for i, first in enumerate(window["_offsets"]):
            for j, last in enumerate(window["_offsets"]):
                if first and last and i <= j:
                    best = max(best, (float(starts[i] + ends[j]), TEXT[first[0] : last[1]].strip()))
    assert found.score == pytest.approx(best[0], abs=1e-5)
    assert found.text == best[1]
    assert TEXT[found.start : found.end] == found.text


def test_predictions_do_not_depend_on_their_batch_and_leave_the_model_alone(tokenizer):
    shape = dict(
        vocab_size=tokenizer.vocab_size, context_length=40, num_layers=1, num_heads=2, hidden_size=16, dropout=0.5
    )
    texts = ["The cat", "What does the cat see? The big red house", "red", "the house, of course"]
    judge = Encoder(ModelConfig(**shape, encoder="gru", decoder="none", heads=("classify",), labels=("a", "b")))
    table = classify(judge, tokenizer, texts, rows=3)
    torch.testing.assert_close(table.sum(1), torch.ones(4))
    for text, row in zip(texts, table, strict=True):
        torch.testing.assert_close(classify(judge, tokenizer, [text])[0], row, rtol=1e-4, atol=1e-5)
    model = EncoderDecoder(ModelConfig(**shape, encoder="gru"))
    for beams in (1, 3):
        together = translate(model, tokenizer, texts, beams=beams, rows=2)
        assert together == [translate(model, tokenizer, [text], beams=beams)[0] for text in texts]
    assert model.training
    assert judge.training


class SpanLogits(Encoder):
    """The n-th row that is asked for has the logit ``first_tokens[n]`` at its first token, and 0 at ``place``."""

    def __init__(self, config, first_tokens, place):
        super().__init__(config)
        self.first_tokens, self.place = iter(first_tokens), place

    def span_logits(self, encoded):
        logits = torch.full(encoded.states.shape[:2], -50.0)
        for row in logits:
            row[0], row[self.place] = next(self.first_tokens), 0.0
        return logits, logits


@pytest.mark.parametrize(("last", "answered"), [(1.0, False), (-0.5, True)])
def test_no_answer_is_one_where_the_first_token_is_likelier_in_every_window(tokenizer, last, answered):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=24, num_layers=1, num_heads=2, hidden_size=16,
        encoder="transformer", decoder="none", heads=("span",),
    )  # fmt: skip
    found = windows("What?", TEXT, tokenizer, config.context_length)
    assert len(found) > 1
    model = SpanLogits(config, [1.0] * (len(found) - 1) + [last], found[0]["segments"].index(1))
    (span,) = answers(model, tokenizer, [("What?", TEXT)], allow_none=True)
    assert bool(span.text) == answered
