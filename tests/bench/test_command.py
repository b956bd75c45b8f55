"""The command line of ``fastllm bench``: what it writes and refuses, its budget and precision."""

import json
import time
import types

import pytest
import torch

from fastllm.bench import command
from fastllm.bench.results import Run, read_run
from fastllm.cli import main


def test_the_command_writes_shows_and_compares(small, tmp_path, capsys):
    arguments = ["layer_norm", "--provider", "wrong", "missing", "--rounds", "2", "--shape", "first"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no time" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.html", "roofline.png", "speedup.png"}
    assert "missing: not installed" in shown
    file = tmp_path / "bench.json"
    found = json.loads(file.read_text())
    assert found["environment"]["rates"]["copy"] > 0
    rows = read_run(file).rows
    assert all(len(row.samples) == 2 for row in rows if row.problem is None)
    assert command.main(["compare", str(file), str(file)]) == 0
    assert "within the noise" in capsys.readouterr().out


def test_the_budget_covers_the_whole_command(small, tmp_path, monkeypatch):
    budgets, now = [], [100.0]
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def copy_bandwidth(device):
        now[0] += 7
        return 1e9

    monkeypatch.setattr(command, "copy_bandwidth", copy_bandwidth)
    monkeypatch.setattr(command, "run", lambda planned, device, asked, **more: budgets.append(asked.budget) or Run({}))
    monkeypatch.setattr(command, "_shown", lambda found, folder: [])
    assert command.main(["layer_norm", "--budget", "40", "--out", str(tmp_path)]) == 1
    assert budgets == [40 - 10 - 7]


def test_a_budget_that_measuring_has_spent_is_no_negative_one(small, tmp_path, monkeypatch):
    budgets = []
    monkeypatch.setattr(command, "copy_bandwidth", lambda device: time.sleep(0.5) or 1e9)
    monkeypatch.setattr(command, "run", lambda planned, device, asked, **more: budgets.append(asked.budget) or Run({}))
    monkeypatch.setattr(command, "_shown", lambda found, folder: [])
    assert command.main(["layer_norm", "--budget", "0.1", "--out", str(tmp_path)]) == 1
    assert budgets == [0.0]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_the_default_precision_is_one_that_the_device_multiplies(small, tmp_path, monkeypatch, default):
    asked = []
    monkeypatch.setattr(command.cpu, "matmul_dtype", lambda device: default)
    monkeypatch.setattr(command, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(command, "matmul_flops", lambda device, dtype: {torch.float32: 1e9}.get(dtype, 2e9))
    monkeypatch.setattr(command, "_shown", lambda found, folder: [])

    def no_run(planned, device, request, environment, **more):
        asked.append((request.dtypes, environment["rates"]["matrix"]))
        assert environment["cpu"]
        return Run(environment)

    monkeypatch.setattr(command, "run", no_run)
    command.main(["layer_norm", "--out", str(tmp_path)])
    command.main(["layer_norm", "--dtype", "float16", "float32", "--out", str(tmp_path)])
    name = str(default).removeprefix("torch.")
    assert asked == [([name], 1e9 if default == torch.float32 else 2e9), (["float16", "float32"], 2e9)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_op"], "no op 'no_such_op'"),
        (["--rounds", "1"], "--rounds: expected at least 2"),
        (["--budget", "0"], "--budget: expected a positive"),
        (["compare", "one.json"], "the following arguments are required: B.json"),
        (["compare", "/nowhere/a.json", "/nowhere/b.json"], "error: /nowhere/a.json: No such file"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--budget", "nan"], "--budget: expected a positive"),
        (["--shape", "no such"], "no shape of these ops has 'no such' in its name"),
        (["--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["--device", "nothing"], "--device: expected cpu or cuda, got 'nothing'"),
        (
            ["rms_norm", "--device", "cpu", "--provider", "quac"],
            "--provider: expected some of fastllm, eager",
        ),
        (["report"], "the following arguments are required: A.json"),
        (["report", "/nowhere/a.json"], "error: /nowhere/a.json: No such file"),
    ],
)
def test_bad_options_are_refused_before_any_work(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_run_is_named(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"environment": {"device": "x", "rates": {"copy": 1, "matrix": 1}}, "rows": [{"a": 1}]}')
    with pytest.raises(SystemExit):
        command.main(["compare", str(file), str(file)])
    assert "other.json: not a bench.json" in capsys.readouterr().err


def test_the_command_line_hands_over(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "no_such_op"])
    assert stop.value.code == 2
    assert "no op 'no_such_op'; the ops are" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "train", "--rounds", "0"])
    assert stop.value.code == 2
    assert "--rounds: expected at least 1" in capsys.readouterr().err
