"""What hostile users and unlucky moments do to commands and runs: devices, full outputs, signals, two at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from prose import prose
from thorough import THOROUGH
from toy import TOY

from fastllm import files
from fastllm.cli import main
from fastllm.config import InputError, build_settings, read_plain
from fastllm.data import Tokenizer
from fastllm.data.token_file import TokenWriter
from fastllm.files import folder_to_fill, whole_file, whole_folder
from fastllm.generate import beam_search, generate, greedy
from fastllm.models import Transformer
from fastllm.training import TrainingConfig, launch, resume, train
from fastllm.training.checkpoints.checkpoint import checkpoints, read_state
from fastllm.training.clock import StopRequest
from fastllm.training.objectives import CausalLM
from fastllm.training.reports.curves import plot_terms
from fastllm.training.reports.progress import Display, read_metrics

pytestmark = pytest.mark.usefixtures("short_runs")
SMALL = [
    "--num-layers", "1", "--num-heads", "2", "--hidden-size", "32", "--context-length", "32", "--vocab-size", "300",
    "--batch-size", "4", "--device", "cpu", "--dtype", "float32", "--data", "prose.txt", "--out", "run",
]  # fmt: skip
# ``fastllm`` in a process of its own, as short as ``short_runs``, and saving for half a second at least.
FASTLLM = f"""
import sys, time, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from fastllm.cli import main
from fastllm.training.checkpoints import checkpoint
from toy import shorten_runs
torch.set_num_threads(1)
shorten_runs()
real = checkpoint.write_manifest
checkpoint.write_manifest = lambda folder: (time.sleep(0.5), real(folder))
sys.exit(main(sys.argv[1:]))
"""


def code(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out="], "out: expected a value, got an empty one"),
        (["train", "--data", ""], "data: expected a value"),
        (["train", "--wandb=\udcff"], r"wandb: expected UTF-8, got '\udcff'"),
        (["train", "--batch-size", "9" * 30], "batch_size: expected at most 9223372036854775807"),
        (["train", "--num-layers", "1000000"], "num_layers: expected at most 10000"),
        (["train", "--muon-lr", "1e308"], "muon_lr: expected a finite number (of float32)"),
        (["train", "--bogus=a\nb"], "unrecognized arguments: --bogus=a b"),
        (["train", "--wandb", "x", "--out", "run"], "W&B is not installed"),
        (["export", "", "x"], "expected a path, got an empty text"),
        (["generate", "--seed", "-1"], "seed must be at least 0"),
        (["generate", "--run", "x" * 300], "File name too long"),
        (["prepare", "x" * 300, "--out", "x", "--workers", "0"], "File name too long"),
        (["prepare", "a.txt", "--out", "x", "--workers", "99999"], "workers: expected 0 to 1024"),
        (
            ["tokenizer", "train", "a.txt", "--out", "x", "--quiet", "--vocab-size", "9" * 20],
            "vocab_size: expected at most",
        ),
        (["plan", "--params", "9" * 400], "expected at most 1e+18"),
        (["plan", "--context-length", "9" * 30], "--context-length: expected at least 1 and at most"),
        (["plan", "--efficiency", "1.5"], "--efficiency: expected more than 0 and at most 1, got 1.5"),
        (["plan", "--overlap", "-0.5"], "--overlap: expected at least 0 and at most 1, got -0.5"),
        (["bench", "--rounds", "x"], "argument --rounds: invalid int value"),
    ],
)
def test_a_bad_value_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastllm.training.reports.progress.importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.txt").write_text(prose(80))
    assert code(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert os.listdir() == ["a.txt"]


def test_text_in_a_config_file_is_checked_like_a_flag():
    for bad in ("", "a\0b", "\ud800"):
        with pytest.raises(InputError, match="here: wandb: expected UTF-8 text that is not empty"):
            build_settings(TrainingConfig, {"wandb": bad}, "here")


# Files that are none


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="not a file"), whole_file(target):
            pass
    assert sorted(os.listdir(tmp_path)) == ["pipe"]
    with pytest.raises(InputError, match="/dev/zero: neither a file nor a folder"):
        read_plain("/dev/zero")
    for number in (0, True, None):
        with pytest.raises(TypeError, match=f"expected a path, got {number}"):
            read_plain(number)


def test_a_failed_command_takes_away_only_what_it_has_made(tmp_path):
    def fail():
        with folder_to_fill(tmp_path / "new" / "mine"):
            (tmp_path / "new" / "theirs").mkdir()  # by another process, meanwhile
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert os.listdir(tmp_path / "new") == ["theirs"]


@pytest.mark.parametrize("system", [True, False])
def test_a_folder_is_replaced_whatever_stood_there(tmp_path, monkeypatch, system):
    if not system:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "file").write_text("file")
    for name in ("old", "link", "file", "new"):
        with whole_folder(tmp_path / name) as folder:
            (folder / "content").write_text(name)
        assert os.listdir(tmp_path / name) == ["content"]
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "new", "old"]


# Two at once


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "ab")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_which_another_process_trains_is_refused_until_that_has_ended(config, tmp_path):
    train(config(steps=2), tmp_path / "run", quiet=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run" / "lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="run: another process is writing there"):
            resume(tmp_path / "run", {"steps": 3}, quiet=True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    (tmp_path / "run" / ".model.1.tmp").mkdir()  # what a killed one was writing
    assert resume(tmp_path / "run", {"steps": 3}, quiet=True).steps == 3
    assert not (tmp_path / "run" / ".model.1.tmp").exists()


def test_a_number_that_another_run_was_faster_to_take_is_left_to_it(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0001").mkdir(parents=True)
    (tmp_path / "runs" / "1\u00b2").mkdir()  # a digit to Python, no number
    numbers = iter([launch.RUNS / "0001", launch._next_run()])
    monkeypatch.setattr(launch, "_next_run", lambda: next(numbers))
    assert train(config(steps=1), quiet=True).folder.name == "0002"


@pytest.mark.parametrize("name", ["config.toml", "data", "model"])
def test_a_folder_with_other_content_is_not_trained_in(config, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"holds {name}, which belongs to no run; choose another --out"):
        train(config(), tmp_path, quiet=True)
    assert os.listdir(tmp_path) == [name]


def test_a_trained_model_without_its_checkpoints_is_not_trained_over(config, tmp_path):
    train(config(steps=1), tmp_path / "run", quiet=True)
    files.remove(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="holds a trained model already"):
        train(config(steps=1), tmp_path / "run", quiet=True)


# Numbers that are not finite


def test_a_run_with_steps_and_scores_that_are_not_finite_ends_and_goes_on(config, tmp_path, monkeypatch, whole_run):
    real, calls = CausalLM.losses, []

    def losses(model, batch):
        calls.append(1)
        result = real(model, batch)
        return {"loss": result["loss"] * float("nan")} if len(calls) == 2 else result

    monkeypatch.setattr(CausalLM, "losses", staticmethod(losses))
    evaluate = CausalLM.evaluate
    nan = float("nan")

    def scored(self, *args):
        result = evaluate(self, *args)
        return type(result)(nan, result.tokens, {"bits_per_byte": nan}, whole=result.whole)

    monkeypatch.setattr(CausalLM, "evaluate", scored)
    train(config(steps=3, eval_interval=1), tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] is None for line in lines if "lr" in line] == [False, True, False]
    assert {line["validation_loss"] for line in lines if "lr" not in line} == {None}
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert read_state(checkpoints(tmp_path / "run" / "checkpoints")[-1]).validation is None
    assert plot_terms(tmp_path / "run", "title").stat().st_size
    assert resume(tmp_path / "run", {"steps": 4}, quiet=True).steps == 4


def test_a_model_that_gives_nan_is_a_clear_error(monkeypatch):
    model = Transformer(TOY)
    torch.nn.init.constant_(model.token_embedding.weight, float("nan"))
    with pytest.raises(ValueError, match="scores are not finite"):
        list(generate(model, [1], max_new_tokens=2))
    for search in (greedy, beam_search):
        with pytest.raises(ValueError, match="scores are not finite"):
            search(model, torch.ones(2, 1, dtype=torch.long), max_new_tokens=2, stop_token=0)
    torch.nn.init.normal_(model.token_embedding.weight)
    coldest = list(generate(model, [1], max_new_tokens=4, temperature=1e-45))
    assert coldest == list(generate(model, [1], max_new_tokens=4, temperature=0.0))


def test_a_skipped_batch_that_cannot_be_kept_is_no_end(config, tmp_path, monkeypatch):
    real, calls = CausalLM.losses, []

    def losses(model, batch):
        calls.append(1)
        return {name: value * (float("inf") if len(calls) == 1 else 1) for name, value in real(model, batch).items()}

    def full(*args):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(CausalLM, "losses", staticmethod(losses))
    monkeypatch.setattr("fastllm.training.guard.save_tensors", full)
    train(config(steps=2), tmp_path / "run", quiet=True)
    reason = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["skipped_because"]
    assert "could not be kept" in reason
    assert "No space left" in reason


def test_a_session_that_cannot_be_noted_names_its_file(config, tmp_path):
    train(config(steps=1), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "sessions.jsonl").unlink()
    (tmp_path / "run" / "sessions.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*sessions\.jsonl"):
        resume(tmp_path / "run", {"steps": 2}, quiet=True)


def test_a_token_file_that_does_not_fit_is_named_and_gone(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([prose(30)], 300)
    writer = TokenWriter(tmp_path / "train.bin", tokenizer)

    def write():
        with writer:
            monkeypatch.setattr(writer, "_file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115

    with pytest.raises(OSError, match=r"No space left on device: .*train\.bin"):
        write()
    writer._file.close()
    assert os.listdir(tmp_path) == []


# Outputs that fail


def test_training_goes_on_when_its_output_cannot_be_written(tmp_path):
    (tmp_path / "prose.txt").write_text(prose(80))
    command = [sys.executable, "-c", FASTLLM, "train", *SMALL, "--steps", "2"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    message = "fastllm: warning: standard output: No space left on device; nothing more is shown\n"
    assert (ended.returncode, ended.stderr) == (0, message)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_display_that_lost_its_reader_is_silent(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        display = Display()
        display.say("once")
        display.say("twice")
    assert capfd.readouterr().err == "fastllm: warning: standard output: Broken pipe; nothing more is shown\n"


def test_a_signal_while_handlers_are_put_back_is_no_error():
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    with stop:
        real = signal.signal
        inside = []

        def put_back(number, handler):
            if not inside:
                inside.append(1)
                stop._note(signal.SIGTERM, None)
            return real(number, handler)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", put_back)
            stop._restore()
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=THOROUGH)])
def test_a_second_signal_while_it_saves_leaves_a_whole_checkpoint(tmp_path, number):
    (tmp_path / "prose.txt").write_text(prose(80))
    command = [sys.executable, "-c", FASTLLM, "train", *SMALL, "--steps", "100000", "--quiet"]
    folder = tmp_path / "run" / "checkpoints"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        while process.poll() is None and not list(folder.glob(".step-*")):
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.count("\n") == 1
    assert not list(folder.glob(".*"))
    (path,) = checkpoints(folder)
    assert read_state(path).step > 0


def test_a_terminated_command_removes_what_it_was_writing(tmp_path, monkeypatch, capsys):
    def killed(*args, **kwargs):
        with folder_to_fill(tmp_path / "half"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    monkeypatch.setattr("fastllm.commands.info.run", killed)
    assert code("info") == 143
    assert capsys.readouterr().err == "fastllm info: error: SIGTERM\n"
    assert os.listdir(tmp_path) == []
