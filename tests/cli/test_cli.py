"""The command line as its users meet it: what it prints, leaves and refuses."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from command_line import check_refused, run
from prose import prose

from fastllm import __version__
from fastllm.config import InputError, settings
from fastllm.data import DataConfig, Tokenizer
from fastllm.models import PRESETS, TransformerConfig
from fastllm.training import TrainingConfig, build_run_config, read_run_config
from fastllm.training.reports import report

pytestmark = pytest.mark.usefixtures("one_thread")
TOY = [
    "--num-layers", "1", "--num-heads", "2", "--hidden-size", "32", "--context-length", "32",
    "--vocab-size", "300", "--batch-size", "4", "--device", "cpu", "--dtype", "float32", "--steps", "4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 6)
    (tmp_path / "prose.txt").write_text(prose(80))


def train(*arguments):
    return run("train", *TOY, "--data", "prose.txt", *arguments)


@pytest.fixture
def refused(capsys):
    """:func:`command_line.check_refused` for this test's output."""
    return partial(check_refused, capsys)


# Flags and files from dataclasses


def test_every_setting_is_a_flag_and_a_key_and_has_help(capsys):
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for cls in (DataConfig, TransformerConfig, TrainingConfig):
        for setting in settings(cls):
            assert setting.metadata["help"]
            assert setting.flag in shown


def test_a_preset_on_the_command_line_replaces_the_files_model(tmp_path, capsys):
    tables = {"model": {"preset": "gpt2", "num_layers": 3}}
    assert build_run_config(tables, "f").model == PRESETS["gpt2"].replace(num_layers=3)
    with pytest.raises(InputError, match="f: preset: expected one of tiny"):
        build_run_config({"model": {"preset": "gpt9"}}, "f")


def test_no_command_names_the_commands(capsys):
    assert run() == 2
    assert "expected a command: prepare, tokenizer, train" in capsys.readouterr().err


def test_version_and_info(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fastllm {__version__}\n"
    assert run("info") == 0
    assert "layer_norm" in capsys.readouterr().out


def test_python_m_fastllm_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "fastllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastllm {__version__}\n"


def test_a_backend_that_cannot_serve_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("fastllm.backends._choice", "cuda")
    assert run("info") == 2
    assert capsys.readouterr().err == (
        "fastllm info: error: FASTLLM_BACKEND: expected auto, eager, triton, native, hopper; got 'cuda'\n"
    )
    monkeypatch.setattr("fastllm.backends._choice", "triton")
    monkeypatch.setattr("fastllm.backends._INTERPRETING", False)
    assert train("--out", "run", "--quiet", "--dtype", "auto") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the triton backend was asked for" in err
    assert not os.path.exists("run")


def test_warnings_take_one_line(capsys, monkeypatch):
    monkeypatch.setattr("fastllm.info", lambda: warnings.formatwarning("odd", UserWarning, "file.py", 1))
    assert run("info") == 0
    assert capsys.readouterr().out == "fastllm: warning: odd\n\n"
    assert "UserWarning" in warnings.formatwarning("odd", UserWarning, "file.py", 1)


def test_train_generate_resume(capsys):
    assert train("--out", "run") == 0
    out = capsys.readouterr().out
    assert "num_layers = 1" in out  # the resolved settings
    assert "vocab_size = 300" in out
    assert read_run_config("run/config.toml").training.steps == 4
    assert sorted({*os.listdir("run")} - {"tensorboard"}) == [
        "checkpoints", "config.toml", "data", "lock", "loss.png", "metrics.jsonl", "model", "samples.txt",
        "sessions.jsonl",
    ]  # fmt: skip

    def generate(*arguments):
        assert run("generate", "--prompt", "the quick", "--max-new-tokens", 12, *arguments) == 0
        return capsys.readouterr().out

    seeded = generate("--run", "run", "--seed", 1)
    assert seeded.startswith("the quick")
    assert seeded == generate("--model", "run/model", "--seed", 1)
    assert seeded == generate("--model", "run/checkpoints/step-00000004", "--seed", 1)
    assert seeded != generate("--run", "run", "--seed", 2)
    greedy = [generate("--run", "run", "--seed", s, "--temperature", 0, "--top-k", 5, "--top-p", 0.9) for s in (1, 2)]
    assert greedy[0] == greedy[1]

    assert run("train", "--resume", "run", "--steps", 6) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert read_run_config("run/config.toml").training.steps == 6


def test_runs_are_numbered_and_generate_takes_the_newest(capsys):
    assert train("--quiet") == 0
    assert train("--quiet", "--seed", 5) == 0
    assert sorted(os.listdir("runs")) == ["0001", "0002"]
    os.utime("runs/0001", (time.time() + 9,) * 2)
    assert capsys.readouterr() == ("", "")
    assert run("generate", "--seed", 1, "--max-new-tokens", 8) == 0
    newest = capsys.readouterr().out
    assert run("generate", "--seed", 1, "--max-new-tokens", 8, "--run", "runs/0001") == 0
    assert capsys.readouterr().out == newest


def test_flags_override_the_file(capsys):
    with open("mine.toml", "w") as file:
        file.write(
            '[data]\ndata = ["prose.txt"]\n[model]\npreset = "small"\nnum_layers = 1\nhidden_size = 12\n'
            'vocab_size = 290\ncontext_length = 16\n[training]\nsteps = 2\nlr = 1\ndevice = "cpu"\n'
            'dtype = "float32"\n'  # "auto" measures, and may choose otherwise the second time
        )
    assert run("train", "--config", "mine.toml", "--out", "run", "--lr", "0.5", "--quiet") == 0
    config = read_run_config("run/config.toml")
    assert (config.training.lr, config.training.steps, config.model.num_layers) == (0.5, 2, 1)
    assert config.model.num_heads == PRESETS["small"].num_heads
    # A run's own config.toml is such a file, and makes the same run.
    assert run("train", "--config", "run/config.toml", "--out", "again", "--quiet") == 0
    first, second = (Path(name, "model", "model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second


def test_a_tokenizer_can_be_given(refused):
    Tokenizer.train([prose(60, 3)], 280).save("mine.json")
    refused("mine.json: 280 tokens do not match vocab_size 300", "train", *TOY, "--tokenizer", "mine.json")
    assert train("--quiet", "--tokenizer", "mine.json", "--out", "run", "--vocab-size", 280) == 0
    assert read_run_config("run/config.toml").model.vocab_size == 280


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        (r"none\.txt: No such file", "--data none.txt"),
        (r"empty\.txt: an empty file", "--data empty.txt"),
        (r"binary\.txt: a binary file", "--data binary.txt"),
        (r"latin\.txt: not UTF-8", "--data latin.txt"),
        (r"no text file in folder", "--data folder"),
        (r"/dev/zero: neither a file nor a folder", "--data /dev/zero"),
        (r"too little text", "--data letter.txt"),
        (r"context_length: the training text has [\d,]+ tokens", "--data prose.txt --context-length 100000"),
        (r"none\.json: No such file", "--tokenizer none.json"),
        (r"prose\.txt: not a tokenizer", "--tokenizer prose.txt"),
        (r"vocab_size: expected at least 257", "--vocab-size 100"),
        (r"batch_size: expected at least 1, got 0", "--batch-size 0"),
        (r"lr: expected more than 0, got -1", "--lr -1"),
        (r"lr: expected a finite number", "--lr nan"),
        ("dropout: expected less than 1, got 1.5", "--dropout 1.5"),
        (r"num_heads: expected a divisor of hidden_size 192, got 5", "--num-heads 5"),
        (r"max_seconds: expected more than 0", "--max-seconds 0"),
        (r"argument --steps: invalid int value: 'many'", "--steps many"),
        (r"argument --optimizer: invalid choice: 'sgd'", "--optimizer sgd"),
        (r"unrecognized arguments: --learning-rate 1$", "--learning-rate 1"),
        (r"unrecognized arguments: --step 1; did you mean --steps\?", "--step 1"),
        (r"argument --preset: invalid choice: 'gpt5'", "--preset gpt5"),
        (r"none\.toml: No such file", "--config none.toml"),
        (r"prose\.txt: not a TOML file", "--config prose.txt"),
        (r"unknown\.toml: unknown key 'learning_rate'", "--config unknown.toml"),
        (r"table\.toml: unknown key 'trainin'; did you mean 'training'", "--config table.toml"),
        (r"loose\.toml: 'steps' belongs into the table \[training\]", "--config loose.toml"),
        (r"type\.toml: num_layers: expected int, got 'two'", "--config type.toml"),
        (r"none: no such run", "--resume none"),
        (r"folder: no checkpoint", "--resume folder"),
        (r"--resume: a run keeps its settings; --lr cannot", "--resume folder --lr 1"),
        (r"--resume: a run keeps its settings; --out cannot", "--resume folder --out x"),
        (r"prose\.txt: cannot write there: ", "--out prose.txt"),
        (r"prose\.txt/run: cannot write there: Not a directory", "--out prose.txt/run"),
    ],
)
def test_train_refuses(refused, tmp_path, pattern, arguments):
    (tmp_path / "folder").mkdir()
    for name, content in {
        "empty.txt": b"", "binary.txt": b"\x7fELF\0\0", "latin.txt": b"caf\xe9", "letter.txt": b"x",
        "unknown.toml": b"[training]\nlearning_rate = 1\n", "table.toml": b"[trainin]\nsteps = 1\n",
        "loose.toml": b"steps = 1\n", "type.toml": b"[model]\nnum_layers = 'two'\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    refused(pattern, "train", *arguments.split())


def test_a_read_only_folder_is_refused(refused, monkeypatch):
    def read_only(dir):  # root may write everywhere, so permissions alone would not do
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), f"{dir}/tmp")

    monkeypatch.setattr("fastllm.files.tempfile.TemporaryFile", read_only)
    refused("locked/run: cannot write there: Read-only file system", "train", *TOY, "--out", "locked/run")


def test_no_command_and_an_unknown_one(capsys):
    for arguments in ([], ["fly"]):
        assert run(*arguments) == 2
        assert capsys.readouterr().err.startswith("fastllm: error: ")


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("no run in runs", ""),
        ("none: no such run", "--run none"),
        ("none: no such folder", "--model none"),
        ("empty/tokenizer.json: No such file", "--model empty"),
        ("temperature must be at least 0", "--temperature -1"),
        ("top_k must be at least 1", "--top-k 0"),
        (r"top_p must be in \(0, 1\]", "--top-p 1.5"),
        ("max_new_tokens must be at least 0", "--max-new-tokens -1"),
        ("not allowed with argument", "--run a --model b"),
    ],
)
def test_generate_refuses(refused, tmp_path, pattern, arguments):
    (tmp_path / "empty").mkdir()
    refused(pattern, "generate", *arguments.split())


def test_generate_refuses_damaged_weights_and_a_tokenizer_that_does_not_match(refused, tmp_path):
    assert train("--quiet", "--out", "run") == 0
    model = tmp_path / "run" / "model"
    kept = {path.name: path.read_bytes() for path in model.iterdir()}
    os.truncate(model / "model.safetensors", 1000)
    refused(r"run/model/model\.safetensors: damaged", "generate", "--run", "run")
    (model / "manifest.json").unlink()
    refused(r"model\.safetensors cannot be read", "generate", "--model", model)
    (model / "model.safetensors").write_bytes(kept["model.safetensors"])
    Tokenizer.train([prose(60, 3)], 280).save(model / "tokenizer.json")
    refused(r"tokenizer\.json: 280 tokens do not match the model's vocab_size 300", "generate", "--model", model)
    (model / "manifest.json").write_bytes(kept["manifest.json"])
    refused(r"tokenizer\.json: damaged", "generate", "--run", "run")


def test_resume_names_damage_and_goes_on_from_the_checkpoint_before(refused, tmp_path):
    assert train("--quiet", "--out", "run", "--checkpoint-interval", 2) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    kept = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(kept[: len(kept) // 2])
    with pytest.warns(RuntimeWarning, match=r"step-00000004/optimizer\.safetensors: damaged.*step-00000002 is used"):
        assert run("train", "--resume", "run", "--quiet") == 0
    (newest / "optimizer.safetensors").write_bytes(kept[: len(kept) // 2])
    refused(
        r"step-00000004/optimizer\.safetensors: damaged: \d+ bytes expected, \d+ found",
        "train", "--resume", newest,
    )  # fmt: skip
    (newest / "optimizer.safetensors").write_bytes(kept)
    Tokenizer.train([prose(60, 3)], 280).save(tmp_path / "run" / "data" / "tokenizer.json")
    refused("made with another tokenizer", "train", "--resume", "run")


# Failures on the way


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_no_room_on_the_disk_is_one_line_and_leaves_no_half(capsys, tmp_path, limit):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond the limit: the tokenizer, or only the weights, do not fit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = train("--out", "run", "--quiet", "--hidden-size", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == 1
    assert err.count("\n") == 1
    assert re.search(r"fastllm train: error: .*(File too large|Errno 27|os error 27)", err), err
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".") or "step-" in path.name]
    assert left == []
    if limit == 2_000:
        assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_one_line(capsys):
    assert train("--out", "run", "--lr", "1e38", "--muon-lr", "1e38", "--quiet", "--steps", 20) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(r"fastllm train: error: step \d+: loss .*lower the learning rate", err)


def test_a_model_that_does_not_fit_into_memory_is_one_line(capsys):
    assert run("train", "--hidden-size", 1_000_000_000, "--out", "run") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("fastllm train: error: out of memory; a smaller model")
    assert not os.path.exists("run")


def test_a_budget_that_is_over_at_once_still_ends_in_order(capsys):
    assert train("--out", "run", "--max-seconds", "1e-9", "--quiet") == 0
    assert read_run_config("run/config.toml").training.max_seconds == 1e-9


@pytest.fixture
def start():
    """Starts ``fastllm`` in a process of its own."""
    started = []

    def start(*arguments):
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "fastllm", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(tmp_path, start):
    process = start("train", *TOY, "--data", "prose.txt", "--out", "run", "--steps", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    step = int(re.search(r"SIGINT: saved after step (\d+); to go on:\n  fastllm train --resume run\n", out)[1])
    assert run("train", "--resume", "run", "--steps", step + 2, "--quiet") == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 3))


def test_a_reader_that_leaves_is_no_traceback(start):
    assert train("--quiet", "--out", "run") == 0
    process = start("generate", "--run", "run", "--max-new-tokens", "100")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
