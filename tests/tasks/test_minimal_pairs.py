"""Minimal pairs: their files, the probability of a sentence, and the score."""

import json
import math
import re

import pytest
import torch

from fastllm.cli import main
from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.models import ModelConfig, build_model
from fastllm.tasks.minimal_pairs import blimp_scores, log_probabilities, read_blimp
from fastllm.training.checkpoints.checkpoint import save_model

SENTENCES = ["The cats see the dog.", "The cats sees the dog.", "A dog barks", "A dog bark \u2028 é"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SENTENCES, 280)


def model_of(tokenizer, **kinds):
    torch.manual_seed(1)
    shape = dict(vocab_size=tokenizer.vocab_size, context_length=32, num_layers=1, num_heads=2, hidden_size=16)
    model = build_model(ModelConfig(**{**shape, **kinds}))
    for p in model.requires_grad_(False).parameters():
        p.mul_(4)
    return model


def write_blimp(folder, files=2, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        records = [
            {"sentence_good": SENTENCES[i], "sentence_bad": SENTENCES[i + 1], "field": "syntax",
             "linguistics_term": "agreement", "UID": f"paradigm_{number}", "pairID": str(i), **changes}
            for i in (0, 2)
        ]  # fmt: skip
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"paradigm_{number}.jsonl").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("kinds", [{}, {"decoder": "lstm"}, {"context_length": 4, "positions": "rotary"}])
def test_a_sentences_probability_is_the_product_of_its_tokens(tokenizer, kinds):
    model, sentences = model_of(tokenizer, **kinds).train(), [*SENTENCES, " ".join(SENTENCES)]
    found = log_probabilities(model, tokenizer, sentences)
    assert model.training
    model.eval()
    context = model.config.context_length
    for sentence, value in zip(sentences, found, strict=True):
        ids, expected = [tokenizer.end_of_text, *tokenizer.encode(sentence)], 0.0
        for end in range(1, len(ids)):
            # Beyond a context each window begins half a context after the one before, and the last ends the sentence.
            begin = math.ceil(max(0, end - context) / (context // 2)) * (context // 2)
            begin = min(begin, max(0, len(ids) - 1 - context))
            expected += model(torch.tensor([ids[begin:end]]))[0, -1].log_softmax(-1)[ids[end]].item()
        assert value == pytest.approx(expected, rel=1e-4)
        assert log_probabilities(model, tokenizer, [sentence]) == pytest.approx([value], rel=1e-4)
    assert log_probabilities(model, tokenizer, []) == []


def test_the_score_is_the_mean_over_paradigms_and_a_tie_is_wrong(tokenizer, tmp_path):
    model = model_of(tokenizer)
    paradigms = read_blimp(write_blimp(tmp_path / "blimp" / "data").parent)
    assert [(p.name, p.term, len(p.pairs)) for p in paradigms] == [
        ("paradigm_0", "agreement", 2), ("paradigm_1", "agreement", 2),
    ]  # fmt: skip
    scores, rows = blimp_scores(model, tokenizer, paradigms)
    values = log_probabilities(model, tokenizer, SENTENCES)
    right = [values[0] > values[1], values[2] > values[3]]
    assert scores["blimp"] == scores["terms"]["agreement"] == scores["paradigms"]["paradigm_1"] == sum(right) / 2
    assert (scores["pairs"], scores["right"]) == (4, 2 * sum(right))
    size = len((SENTENCES[0] + SENTENCES[2]).encode())
    assert scores["bits_per_byte"] == pytest.approx(-(values[0] + values[2]) / math.log(2) / size, rel=1e-5)
    assert [row["log_probability_bad"] for row in rows[:2]] == pytest.approx([values[1], values[3]], rel=1e-4)
    same = write_blimp(tmp_path / "same", 1, sentence_bad="A dog", sentence_good="A dog")
    assert blimp_scores(model, tokenizer, read_blimp(same))[0]["blimp"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence_good": "a"}', "line 1: expected JSON with sentence_good and sentence_bad"),
        ('{"sentence_good": "a", "sentence_bad": 3}', "line 1: expected JSON"),
        ('{"sentence_good": "a", "sentence_bad": " "}', "line 1: an empty sentence"),
        ('\n{"sentence_good": "a", "sentence_bad": "\\ud800"}', "line 2: half a surrogate pair"),
        ('{"sentence_good": "a", "sentence_bad": "b", "UID": "\\ud800"}', "line 1: half a surrogate pair"),
        ("no", "line 1: expected JSON"), ("[1]", "line 1: expected JSON"), ("", "an empty file"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"x\.jsonl: {message}"):
        read_blimp(tmp_path)


def test_the_command_scores_a_language_model(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", model_of(tokenizer), tokenizer)
    judge = dict(encoder="transformer", decoder="none", heads=("classify",))
    masked = Tokenizer.train(SENTENCES, 280, special_tokens=("<|endoftext|>", "[CLS]", "[SEP]"))
    save_model(tmp_path / "judge", model_of(masked, **judge), masked)
    write_blimp(tmp_path / "blimp")
    evaluate = ["eval", "--device", "cpu", "--model"]
    assert main([*evaluate, "model", "--blimp", "blimp", "--out", "scores"]) == 0
    out = capsys.readouterr().out
    assert re.match(
        r"pairs: 4\nblimp: [01]\.\d{4}\nblimp interval: 0\.\d{4} to [01]\.\d{4} \(95%\)\nbits per byte: \d+\.\d{4}\n",
        out,
    )
    assert "paradigms:\n  paradigm 0: " in out
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["pairs"] == 4
    assert (tmp_path / "scores" / "predictions.jsonl").read_text("utf-8").count("\n") == 4
    (tmp_path / "text.txt").write_text("The cats see the dog. " * 30)
    assert main([*evaluate, "model", "text.txt", "--blimp", "blimp", "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^pairs: 2\n", out)
    assert re.search(r"^blimp bits per byte: .*\nbits per byte: ", out, re.MULTILINE)
    for arguments, message in (
        (["model"], "data: expected files to score on, or --blimp"),
        (["model", "--blimp", "absent"], "blimp: absent: no such folder"),
        (["model", "--blimp", "model"], r"blimp: model: no \.jsonl file in it"),
        (["judge", "--blimp", "blimp"], "minimal pairs are for language models"),
    ):
        assert main([*evaluate, *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
