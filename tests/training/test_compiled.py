"""Runs under torch.compile: what is compiled, when, and that nothing else changes."""

import functools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from thorough import THOROUGH
from toy import weights

from fastllm.training import session, train
from fastllm.training.clock import Clock
from fastllm.training.objectives import ObjectiveConfig
from fastllm.training.reports.progress import read_metrics

pytestmark = pytest.mark.usefixtures("short_runs")


def test_short_windows_and_long_ones_are_compiled_before_the_clock_starts(config, tmp_path, monkeypatch):
    shapes, starts = [], []

    class Started(Clock):
        def __init__(self, *arguments):
            starts.append(len(shapes))
            super().__init__(*arguments)

    monkeypatch.setattr(session, "Clock", Started)
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, options: lambda model, batch: (shapes.append(batch["tokens"].shape), f(model, batch))[1],
    )
    train(config(compile=True, steps=2), tmp_path / "run", quiet=True)
    assert starts == [2]
    assert shapes == 2 * [(16, 8), (4, 32)]


def test_recomputing_activations_and_compiling_change_nothing(config, tmp_path, monkeypatch):
    def plain(**training):
        return replace(config(**training), objective=ObjectiveConfig(short_windows=0.0))  # one shape to compile

    train(plain(), tmp_path / "a", quiet=True)
    train(plain(checkpoint_activations=True), tmp_path / "b", quiet=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    # Inductor takes half a minute; what is ours is that the compiled function is the one that trains.
    calls = []

    def compile_(function, options):
        compiled = functools.partial(torch._dynamo.optimize("eager"), function)()
        return lambda *batch: (calls.append(1), compiled(*batch))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    train(plain(compile=True), tmp_path / "c", quiet=True)
    assert len(calls) == 7  # one to compile, before the clock starts
    for name, value in load_file(tmp_path / "c" / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            value, load_file(tmp_path / "a" / "model" / "model.safetensors")[name], rtol=1e-4, atol=1e-5
        )


@THOROUGH
# Inductor's own import, and what Dynamo looks at while it traces.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("decoder", ["transformer", "gru"])
def test_a_compiled_run_drops_what_an_uncompiled_one_drops(config, tmp_path, decoder):
    """Losses of other masks were 1.3e-3 apart."""
    found = []
    for compile_ in (False, True):
        settings = config(compile=compile_, steps=3, micro_batch_size=2)
        settings = replace(
            settings,
            model=settings.model.replace(dropout=0.3, decoder=decoder),
            objective=ObjectiveConfig(short_windows=0.0),
        )
        run = tmp_path / str(compile_)
        train(settings, run, quiet=True)
        found.append([line["loss"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
