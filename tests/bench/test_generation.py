"""``python -m fastllm.bench.generation``: both sides write the same tokens, and other tokens are an error."""

import json

import pytest
from thorough import THOROUGH

from fastllm.bench import generation

SMALL = dict(vocab_size=97, context_length=64, num_layers=1, num_heads=2, hidden_size=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generation, "SHAPE", SMALL)
    monkeypatch.setattr(generation, "PROMPT", 3)
    monkeypatch.setitem(generation.DECODERS["llama"], "num_kv_heads", 1)
    monkeypatch.setattr(generation.torch, "set_num_threads", lambda threads: None)


@pytest.mark.runs_on("anywhere")
def test_sides_agree(tmp_path, capsys):
    file = tmp_path / "found.json"
    models = ["llama", "t5"] if THOROUGH else ["llama"]
    assert generation.main(["--model", *models, "--tokens", "5", "--rounds", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["models"]
    assert all(row["equal"] and row["written"] == 5 for row in found.values())
    assert [len(times) for row in found.values() for times in row["seconds"].values()] == [2] * 2 * len(models)
    assert capsys.readouterr().out.count("the same tokens") == len(models)


@pytest.mark.runs_on("anywhere")
def test_other_tokens_are_an_error(monkeypatch, capsys):
    right = generation.decoders

    def wrong(name, tokens, shape):
        sides = right(name, tokens, shape)
        return {**sides, generation.OURS: lambda: [-1] * tokens}

    monkeypatch.setattr(generation, "decoders", wrong)
    assert generation.main(["--model", "gpt", "--tokens", "2", "--rounds", "2"]) == 1
    assert "OTHER TOKENS" in capsys.readouterr().out
