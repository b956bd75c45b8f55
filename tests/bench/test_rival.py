"""``fastllm bench --rival``: a function of a stranger's, judged and timed in a process of its own."""

import json

import pytest
import torch
from json_schema import BENCH, problems
from thorough import THOROUGH

from fastllm import OPS
from fastllm.bench import cases, command, rival, run
from fastllm.bench.norms import norm_sample, norm_shapes

CPU = torch.device("cpu")
# What it does is a matter of the rows that it gets.
SOURCE = """
import os, time
import torch.nn.functional as F
F.layer_norm, own = None, F.layer_norm  # nobody else's process has this

def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if len(input) == 7:
        os._exit(3)
    if len(input) == 9:
        time.sleep(1000)
    return own(input, normalized_shape, weight, bias, eps) * (1.1 if len(input) == 5 else 1)

def without_bias(input, normalized_shape, weight=None, eps=1e-5):
    return own(input, normalized_shape, weight, None, eps)

number = 3
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "theirs.py").write_text(SOURCE)
    return f"{tmp_path / 'theirs.py'}:layer_norm"


def _shapes(monkeypatch, *rows):
    shapes = norm_shapes(bias=True, of={f"rows {n}": (n, 24) for n in rows})
    monkeypatch.setattr(cases.importlib.import_module("fastllm.bench.layer_norm"), "shapes", shapes)
    monkeypatch.setattr(cases.importlib.import_module("fastllm.bench.layer_norm"), "cpu_shapes", {})


def test_right_wrong_and_dead(target, tmp_path, monkeypatch, capsys):
    """One process: timed where it is right, refused where it is wrong, named where it died; ours is timed in each."""
    _shapes(monkeypatch, 3, 5, 7)
    arguments = [
        "layer_norm", "--rival", target, "--provider", "eager", "--dtype", "float32", "--rounds", "6",
        "--budget", "36000",
    ]  # fmt: skip
    monkeypatch.setattr(command, "_shown", lambda found, folder: [])
    monkeypatch.setattr(command, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(command, "matmul_flops", lambda device, dtype: 1e9)
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1
    assert not problems(json.loads((tmp_path / "bench.json").read_text()), BENCH)
    found = command.read_run(tmp_path / "bench.json")
    assert not found.left_out
    theirs = {(row.shape, row.direction): row for row in found.rows if row.provider == target}
    assert [len(theirs["rows 3", direction].samples) for direction in run.DIRECTIONS] == [6, 6, 6]
    assert theirs["rows 3", "both"].first_call > 0
    assert theirs["rows 5", "both"].problem.startswith("result 0: error")
    assert theirs["rows 7", "forward"].problem == "its process ended with exit code 3"
    assert not any(row.samples for at, row in theirs.items() if at[0] != "rows 3")
    assert {row.shape for row in found.rows if row.provider == run.OURS and row.samples} == {
        f"rows {n}" for n in (3, 5, 7)
    }
    assert "theirs.py:layer_norm has no time in some calls" in capsys.readouterr().err


@THOROUGH  # starts two processes
def test_one_that_hangs_is_ended_and_started_anew(target, monkeypatch):
    _shapes(monkeypatch, 9, 3)
    monkeypatch.setattr(run, "RIVAL_SHARE", 0.1)
    theirs = rival.Rival(target, CPU)
    request = run.Request(["float32"], 2, 120.0, ["none"], rivals=[theirs])
    found = run.run(run.plan([OPS["layer_norm"]], [""]), CPU, request, tell=lambda line: None)
    theirs.stop()
    assert {row.problem for row in found.rows if (row.shape, row.provider) == ("rows 9", target)} == {
        "stopped after 6 s"
    }
    assert all(row.samples for row in found.rows if row.shape == "rows 3")


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ("input, normalized_shape, weight=None, bias=None, eps=1e-5", None),
        ("*args, **kwargs", None),
        ("input, normalized_shape, weight=None", "got an unexpected keyword argument 'bias'"),
        ("input, shape, eps, weight, bias", "missing a required argument: 'eps'"),
        ("input, *, weight, bias", "too many positional arguments"),
    ],
)
def test_a_signature_that_does_not_fit_is_told(parameters, problem):
    found = rival.Worker(eval(f"lambda {parameters}: None"), CPU).fits(2, ["weight", "bias"])
    assert (found is None) == (problem is None)
    if problem is not None:
        assert found.endswith(f"does not take the call, 2 positional arguments and weight, bias by name: {problem}")


def test_one_that_takes_no_call_is_refused_with_what_the_op_takes(monkeypatch):
    theirs = rival.Rival("module:function", CPU)
    answers = iter(["no", None, "no", "no"])
    monkeypatch.setattr(theirs, "_asked", lambda *arguments: next(answers))
    sample = norm_sample("", (1, 8), True, False, "meta", torch.float32)
    theirs.check(OPS["layer_norm"], [sample, sample])
    with pytest.raises(rival.Refused, match=r"module:function: no; layer_norm takes \(input, normalized_shape,"):
        theirs.check(OPS["layer_norm"], [sample, sample])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("json:dumps.nothing", "AttributeError: 'function' object has no attribute 'nothing'"),
        ("json:__name__", "expected a function, got str"),
        ("a_module_that_nobody_has:f", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("nowhere/theirs.py:f", "there is no file nowhere/theirs.py"),
    ],
)
def test_what_cannot_be_imported_is_refused(text, message, monkeypatch):
    monkeypatch.setattr(rival.sys, "path", list(rival.sys.path))
    with pytest.raises(rival.Refused, match="--rival") as refused:
        rival.load(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["layer_norm", "--rival", "theirs"], "--rival: expected module:function or file.py:function, got 'theirs'"),
        (["--rival", "a:b"], "--rival: expected one OP, whose arguments it takes, got"),
        (["layer_norm", "--rival", "a:b", "--rival", "a:b"], "--rival: the same function is named twice"),
    ],
)
def test_bad_options_are_refused_before_any_work(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
