"""The script of transformers' own assertions finds what differs; tests/transformers_checks.py runs all of them."""

import pytest
import torch
import transformers_checks

import fastllm

pytest.importorskip("transformers")
FEW = ("signature", "training", "attentions_of_eager")


def test_differences_are_found_and_printed(monkeypatch, capsys):
    monkeypatch.setattr(transformers_checks, "CHECKS", {name: transformers_checks.CHECKS[name] for name in FEW})
    assert transformers_checks.main(["llama"]) == 0
    assert "3 pairs, of which 0 raise the same error in both; 0 unknown differences" in capsys.readouterr().out

    def wrong(model, accelerate=fastllm.accelerate, **options):
        report = accelerate(model, **options)
        if not options:
            model.lm_head.weight.data.mul_(1.01)
        return report

    monkeypatch.setattr(fastllm, "accelerate", wrong)
    assert transformers_checks.main(["llama"]) == 1
    assert "llama: training: values differ by" in capsys.readouterr().out
    monkeypatch.setattr(transformers_checks, "KNOWN", {("training", "*"): "so", ("attentions_of_eager", "llama"): "so"})
    assert transformers_checks.main(["llama"]) == 0
    assert "(known: so)" in capsys.readouterr().out


def test_what_counts_as_a_difference():
    differ = transformers_checks.difference
    x = torch.ones(3)
    assert differ(({"a": x}, [1, None]), ({"a": x + 1e-6}, [1, None])) is None
    assert differ("ValueError: a", "ValueError: a") is None
    for got in (
        "ValueError: a",
        {"a": x[:2]},
        {"a": x.double()},
        {"a": x + 0.01},
        {"a": None},
        {"b": x},
        {"a": x.log() / 0},
    ):
        assert differ(got, {"a": x}) is not None, got
