"""``fastllm bench --cpu``: several levels of one CPU in one table. No process is started here that times anything."""

import subprocess
from pathlib import Path

import pytest

from fastllm import cpu
from fastllm.bench import levels
from fastllm.bench.command import main
from fastllm.bench.results import EAGER, OURS, Row, Run
from fastllm.bench.scores import write

ENVIRONMENT = {"device": "a CPU", "rates": {"copy": 1e9, "matrix": 1e9}}


def _run(seconds, environment):
    rows = [
        Row("rms_norm", "4x8", "float32", "both", provider, "", [took] * 3)
        for provider, took in ((OURS, seconds), (EAGER, 3.0))
    ]  # fmt: skip
    return Run(environment, rows)


def test_levels_are_named_once_and_checked():
    assert levels.levels("avx2,AVX512,avx2") == ["avx2", "avx512"]
    for text in ("", ",", "avx2,sse"):
        with pytest.raises(ValueError, match="--cpu: expected some of avx2, avx512, amx"):
            levels.levels(text)


def test_an_option_goes_with_its_value():
    given = ["rms_norm", "--cpu", "avx2", "--budget=9", "--out", "--cpu", "--rounds", "3"]
    assert levels.without(given, "--cpu", "--budget", "--out") == ["rms_norm", "--rounds", "3"]


def test_each_level_is_a_process_with_four_caps(monkeypatch, tmp_path, capsys):
    started = []

    def start(command, env, **options):
        started.append((command, [env[name] for name in levels.VARIABLES]))
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        write(_run(1.5 if "avx2" in str(folder.name) else 1.0, ENVIRONMENT), folder / "bench.json")
        return subprocess.CompletedProcess(command, 0, "said", "")

    monkeypatch.setattr(levels.subprocess, "run", start)
    monkeypatch.setattr(cpu, "level", lambda: "avx512")
    given = ["rms_norm", "--device", "cpu", "--cpu", "avx2,avx512,amx", "--budget", "60", "--out", str(tmp_path / "to")]
    assert main(given) == 0
    assert [caps for _, caps in started] == [list(levels.HELD[name]) for name in ("avx2", "avx512")]
    assert all(command[-4:-2] == ["--budget", "30"] and "--cpu" not in command for command, _ in started)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines[1:3]] == [["avx2", "1", "2.00"], ["avx512", "1", "3.00"]]
    assert lines[3].startswith("amx: skipped")
    assert (tmp_path / "to/avx2/bench.log").read_text() == "said"


def test_a_level_without_times_says_why(monkeypatch, tmp_path, capsys):
    failed = subprocess.CompletedProcess([], 3, "no", "")
    monkeypatch.setattr(levels.subprocess, "run", lambda *args, **options: failed)
    monkeypatch.setattr(cpu, "level", lambda: "avx2")
    assert main(["rms_norm", "--device", "cpu", "--cpu", "avx2", "--out", str(tmp_path)]) == 1
    assert "avx2: no times, code 3" in capsys.readouterr().out
