"""Settings: dataclasses as flags and as TOML, and what is refused."""

import argparse
from functools import partial

import pytest

from fastllm.config import InputError, add_flags, build_settings, read_toml, to_toml
from fastllm.data import DataConfig
from fastllm.models import PRESETS, TransformerConfig
from fastllm.training import RunConfig, TrainingConfig, read_run_config, resume, train


def test_a_config_survives_toml(tmp_path):
    config = RunConfig(
        DataConfig(data=('a "quoted"\\path', "ünï\ncode\x7f"), deduplicate=False),
        PRESETS["llama-1b"],
        TrainingConfig(steps=3, lr=1e-07, compile=True),
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert read_run_config(tmp_path / "config.toml") == config


def test_build_refuses_what_does_not_fit():
    def refuse(values, match):
        with pytest.raises(InputError, match=match):
            build_settings(TrainingConfig, values, "here")

    refuse({"step": 1}, "here: unknown key 'step'; did you mean 'steps'?")
    refuse({"steps": "3"}, "here: steps: expected int, got '3'")
    refuse({"steps": True}, "here: steps: expected int, got True")
    refuse({"steps": 1.5}, "here: steps: expected int, got 1.5")
    refuse({"lr": float("nan")}, "here: lr: expected a finite number")
    refuse({"compile": 1}, "here: compile: expected bool, got 1")
    refuse({"optimizer": "sgd"}, "here: optimizer: expected one of muon, adamw; got 'sgd'")
    refuse({"beta1": 1.0}, "here: beta1: expected less than 1")
    refuse({"batch_size": 4, "micro_batch_size": 3}, "here: micro_batch_size: 3 does not divide")
    with pytest.raises(InputError, match="here: data: expected a list"):
        build_settings(DataConfig, {"data": "text.txt"}, "here")
    assert build_settings(TrainingConfig, {"lr": 1}, "here").lr == 1.0


def test_flags_cover_optional_and_repeated_types():

    parser = argparse.ArgumentParser()
    add_flags(parser, DataConfig, "data")
    add_flags(parser, TransformerConfig, "model")
    given = vars(
        parser.parse_args(["--data", "a", "b", "--data", "c", "--no-deduplicate", "--num-kv-heads", "2", "--no-bias"])
    )
    assert given == {"data": ["a", "b", "c"], "deduplicate": False, "num_kv_heads": 2, "bias": False}


def test_to_toml_leaves_out_what_is_not_set():
    assert "steps" not in to_toml({"training": TrainingConfig()}).replace("checkpoint", "")


def test_read_toml_names_the_line(tmp_path):
    (tmp_path / "bad.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(InputError, match=r"bad\.toml: not a TOML file: .*line 2"):
        read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("wrong", [None, "x", 0, 1.5, b"a", object()])
def test_arguments_of_another_kind_are_named_before_anything_is_written(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    calls = {
        "data: expected a DataConfig": partial(RunConfig, data=wrong),
        "training: expected a TrainingConfig": partial(RunConfig, training=wrong),
        "model: expected a ModelConfig": partial(RunConfig, model=wrong),
        "objective: expected an ObjectiveConfig": partial(RunConfig, objective=wrong),
        "config: expected a RunConfig": partial(train, wrong),
    }
    if not isinstance(wrong, str):
        calls["checkpoint: expected a path"] = partial(resume, wrong)
        if wrong is not None:
            calls["folder: expected a path"] = partial(train, RunConfig(), wrong)
    if wrong is not None:
        calls["changes: expected a mapping of settings"] = partial(resume, "run", wrong)
    for message, call in calls.items():
        with pytest.raises(TypeError, match=f"^{message}"):
            call()
    assert not list(tmp_path.iterdir())
