"""What a run shows and writes down: display, metrics, sessions."""

import contextlib
import importlib.machinery
import json
import sys
import types

import pytest
import torch

from fastllm.cpu import matmul_dtype
from fastllm.training import TrainingConfig, resume, train
from fastllm.training.checkpoints.checkpoint import State
from fastllm.training.clock import Clock
from fastllm.training.reports.meters import Meters, Timer
from fastllm.training.reports.progress import METRICS, Display, read_metrics

pytestmark = pytest.mark.usefixtures("short_runs")


def test_the_display_is_live_on_a_terminal_and_plain_lines_elsewhere(capsys):
    with Display() as display:
        display.update(0.5, "loss 1.0 [odd]")
        display.update(0.6, "too soon")
        display.update(1.0, "last", force=True)
    assert capsys.readouterr().out == " 50%  loss 1.0 [odd]\n100%  last\n"
    with Display(quiet=True) as display:
        display.update(0.5, "loss", force=True)
        display.say("words")
    assert capsys.readouterr().out == ""


def test_a_live_display_shows_what_it_is_given(monkeypatch):
    import io

    from rich.console import Console

    display = Display()
    display.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with display:
        display.update(0.25, "loss 1.0 [odd]")
    shown = display.console.file.getvalue()
    assert "loss 1.0 [odd]" in shown
    assert "25%" in shown


def test_metrics_go_to_tensorboard_where_it_is_installed(config, tmp_path, monkeypatch):
    scalars = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            scalars.append((key, step))

        def close(self):
            scalars.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(
        "fastllm.training.reports.progress.importlib.util.find_spec", lambda name: name == "tensorboard"
    )
    train(config(steps=2), tmp_path / "run", quiet=True)
    assert scalars[0] == (str(tmp_path / "run" / "tensorboard"), 1)
    assert {("loss", 1), ("loss", 2), ("validation_bits_per_byte", 2)} <= set(scalars)
    assert scalars[-1] == "closed"


def test_metrics_go_to_weights_and_biases_and_a_resumed_run_goes_on_there(config, tmp_path, monkeypatch):
    begun = []

    class Begun:
        def __init__(self, **options):
            self.options, self.lines, self.finished = options, [], False
            begun.append(self)

        def log(self, numbers, step):
            self.lines.append((step, numbers))

        def finish(self):
            self.finished = True

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = Begun, importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(config(wandb="toys"), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", {"steps": 8}, quiet=True)
    first, second = begun
    assert first.options["project"] == "toys"
    assert first.options == second.options
    assert second.finished
    steps = [step for one in begun for step, numbers in one.lines if "lr" in numbers]
    assert steps == list(range(1, 9))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert [n["loss"] for one in begun for _, n in one.lines if "lr" in n] == [line["loss"] for line in lines]


def test_a_metrics_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    with contextlib.suppress(FileNotFoundError):
        assert read_metrics(tmp_path / "none") == []


def test_what_a_model_writes_cannot_command_the_terminal(capsys):
    Display().say("a\x1b[2Jb\x9b\x07\nc")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\nc\n"


def test_sessions_say_what_was_measured(config, tmp_path):
    train(config(dtype="auto"), tmp_path / "run", quiet=True)
    (session,) = map(json.loads, (tmp_path / "run" / "sessions.jsonl").read_text().splitlines())
    times = session["seconds_per_forward_backward"]
    # A CPU without products of bfloat16 has nothing to time.
    assert session["dtype"] == (min(times, key=times.get) if times else "float32")
    assert bool(times) == (matmul_dtype(torch.device("cpu")) == torch.bfloat16)
    resume(tmp_path / "run", {"steps": 7}, quiet=True)
    again = json.loads((tmp_path / "run" / "sessions.jsonl").read_text().splitlines()[1])
    assert again["dtype"] == session["dtype"]
    assert again["seconds_per_forward_backward"] == {}  # the choice is kept, not made again


def test_metrics_name_the_slowest_rank_and_how_far_it_is_behind_the_fastest(tmp_path):
    state = State(step=0, seconds=0.0, tokens=0, dtype="float32", data="")
    meters = Meters(tmp_path, Display(quiet=True), TrainingConfig(steps=4), state, flops_per_token=10.0, peak=1e3)
    state.step, state.seconds, state.tokens = 1, 2.0, 64
    meters.step(1.0, {"loss": 3.0}, Timer(), None, own=[1.0, 3.5, 2.5])
    meters.close()
    (line,) = read_metrics(tmp_path / METRICS)
    assert (line["rank_skew_seconds"], line["slowest_rank"]) == (2.5, 1)
    assert (line["tokens_per_second"], line["mfu"]) == (32.0, 0.32)


def test_a_clock_stands_still_within_a_pause(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastllm.training.clock.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock(torch.device("cpu"), 5.0)
    now[0] += 3.0
    with clock.pause():
        now[0] += 50.0
    assert clock.seconds == 8.0
    now[0] += 1.0
    assert clock.seconds == 9.0
