"""Exact resume, signals, checkpoints whole and damaged."""

import errno
import os
import re
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from prose import prose
from safetensors.torch import load_file
from toy import weights

from fastllm.config import InputError
from fastllm.data import Corpus, prepare
from fastllm.files import save_tensors
from fastllm.training import resume, run, session, train
from fastllm.training.checkpoints import checkpoint, saving
from fastllm.training.checkpoints.checkpoint import (
    Keep,
    State,
    check,
    checkpoints,
    find_checkpoint,
    read_state,
    save_checkpoint,
    write_manifest,
)
from fastllm.training.clock import StopRequest
from fastllm.training.objectives import CausalLM
from fastllm.training.reports.progress import read_metrics
from fastllm.training.step import batch_gradients

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "micro_batch_size": 2}, {"dtype": "bfloat16"}])
def test_a_resumed_run_ends_bitwise_like_an_undisturbed_one(config, tmp_path, settings):
    train(config(checkpoint_interval=3, **settings), tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    torch.manual_seed(1234)
    assert resume(tmp_path / "resumed", quiet=True).steps == 6
    assert weights(tmp_path / "whole") == weights(tmp_path / "resumed")
    states = [tmp_path / n / "checkpoints" / "step-00000006" / "optimizer.safetensors" for n in ("whole", "resumed")]
    assert states[0].read_bytes() == states[1].read_bytes()
    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    for key in ("step", "loss", "grad_norm", "lr", "validation_bits_per_byte"):
        assert [line.get(key) for line in whole] == [line.get(key) for line in resumed]


def test_on_another_cpu_a_resumed_run_keeps_its_precision_and_says_so(config, tmp_path, monkeypatch, capsys):
    kinds = ["amx, 16-bit products in hardware: bfloat16", "avx2, 16-bit products in hardware: none"]
    monkeypatch.setattr(run.cpu, "kind", lambda: kinds[0])
    train(config(dtype="bfloat16", steps=2), tmp_path / "run", quiet=True)
    assert read_state(find_checkpoint(tmp_path / "run")).cpu == kinds[0]
    assert resume(tmp_path / "run", {"steps": 3}).steps == 3
    assert "another CPU" not in capsys.readouterr().out
    monkeypatch.setattr(run.cpu, "kind", lambda: kinds[1])
    monkeypatch.setattr(run.cpu, "matmul_dtype", lambda device: torch.float32)
    assert resume(tmp_path / "run", {"steps": 4}).steps == 4
    said = " ".join(capsys.readouterr().out.split())
    assert f"another CPU than before ({kinds[0]}): {kinds[1]}; the run keeps bfloat16" in said
    state = read_state(find_checkpoint(tmp_path / "run"))
    assert (state.dtype, state.cpu) == ("bfloat16", kinds[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_steps_end_and_the_run_goes_on_exactly(config, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    train(config(), tmp_path / "whole", quiet=True)

    def step_and_signal(*args, **kwargs):
        os.kill(os.getpid(), number)
        return batch_gradients(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session, "batch_gradients", step_and_signal)
        result = train(config(), tmp_path / "stopped")
    assert (result.signal, result.steps) == (number, 1)
    assert signal.getsignal(number) == before
    out = capsys.readouterr().out
    assert f"fastllm train --resume {tmp_path / 'stopped'}" in out
    assert not (tmp_path / "stopped" / "model").exists()
    assert resume(tmp_path / "stopped", quiet=True).signal == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")


def test_a_second_signal_acts_as_ever():
    # A shell starts its background jobs with SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, inherited)


def test_a_finished_run_can_be_given_more_steps(config, tmp_path):
    train(config(), tmp_path / "run", quiet=True)
    assert resume(tmp_path / "run", {"steps": 8}, quiet=True).steps == 8
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000006", "step-00000008"]
    assert resume(tmp_path / "run", quiet=True).steps == 8  # the new budget was saved


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where the first test that wants a finished run leaves one."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(config, shared, tmp_path):
    """A finished run of the test's own: a copy of the one that was trained for all of them."""
    if not (shared / "run" / "model").exists():
        train(config(checkpoint_interval=3), shared / "run", quiet=True)
    return shutil.copytree(shared / "run", tmp_path / "run")


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_skipped_and_the_one_before_is_used(finished, name):
    newest, before = (finished / "checkpoints" / f"step-{step:08d}" for step in (6, 3))
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match=rf"step-00000006/{name}: .*damaged.*skipped, step-00000003 is used"):
        assert find_checkpoint(finished) == before
    with pytest.raises(InputError, match=rf"step-00000006/{name}: .*damaged"):
        find_checkpoint(newest)  # this very one was asked for
    if name != "manifest.json":
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.warns(RuntimeWarning, match=rf"step-00000006/{name}: .*SHA-256"):
            find_checkpoint(finished)
        (newest / name).unlink()
        with pytest.warns(RuntimeWarning, match=rf"step-00000006/{name}: damaged: missing"):
            find_checkpoint(finished)
        (newest / name).symlink_to(before / name)
        with pytest.warns(RuntimeWarning, match=rf"step-00000006/{name}: a link"):
            find_checkpoint(finished)
    os.truncate(before / "model.safetensors", 7)
    with pytest.raises(InputError, match=r"step-00000006.*; .*step-00000003"):
        find_checkpoint(finished)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_ends_the_same(finished):
    expected = weights(finished)
    os.truncate(finished / "checkpoints" / "step-00000006" / "model.safetensors", 100)
    (finished / "checkpoints" / ".step-00000005.123.tmp").mkdir()
    with pytest.warns(RuntimeWarning, match="step-00000006/model.safetensors: damaged"):
        assert resume(finished, quiet=True).steps == 6
    assert weights(finished) == expected
    check(finished / "checkpoints" / "step-00000006")
    assert sorted(os.listdir(finished / "checkpoints")) == ["latest", "step-00000003", "step-00000006"]


def test_the_pointer_commits_a_checkpoint(finished):
    folder = finished / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000006\n"
    (folder / "latest").write_text("step-00000003\n")
    assert find_checkpoint(finished).name == "step-00000003"
    for torn in ("", "step-000", "../../etc", "step-00000009\n", "\0" * 500):
        (folder / "latest").write_text(torn)
        assert find_checkpoint(finished).name == "step-00000006"
    (folder / "latest").unlink()
    assert find_checkpoint(finished).name == "step-00000006"


def test_the_newest_and_the_best_are_kept(config, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.75, 2.8])

    def scored(self, *args):
        result = evaluate(self, *args)
        loss = next(losses)
        return replace(result, loss=loss, scores={"bits_per_byte": loss / 2})

    evaluate = CausalLM.evaluate
    monkeypatch.setattr(CausalLM, "evaluate", scored)
    train(config(eval_interval=1, checkpoint_interval=1, keep_checkpoints=1, keep_best=2), tmp_path / "run", quiet=True)
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name[-1] for path in kept] == ["2", "3", "6"]
    assert [read_state(path).validation for path in kept] == [1.0, 2.0, 2.8]
    assert [read_state(path).score for path in kept] == [-0.5, -1.0, -1.4]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_does_not_stop_the_run_until_the_end(config, tmp_path, monkeypatch, capsys, background):
    real, folder = os.fsync, tmp_path / "run" / "checkpoints"

    def full(handle):
        # Only once the first checkpoint is there, and in the middle of the others.
        if (folder / "step-00000002").exists() and any(folder.glob(".step*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    settings = {"checkpoint_interval": 2, "background_saving": background}
    train(config(**settings), tmp_path / "whole", quiet=True)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train(config(**settings), tmp_path / "run", quiet=True)
    assert "step-00000006" in str(caught.value)
    assert re.search("not saved: .*No space left.*step-00000004.*training goes on", capsys.readouterr().err)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]
    check(folder / "step-00000002")
    monkeypatch.setattr(os, "fsync", real)
    assert resume(tmp_path / "run", quiet=True).steps == 6
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_three_failures_in_a_row_stop_the_run(config, tmp_path, monkeypatch):
    tried = []

    def full(*args):
        tried.append(args)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(OSError, match="Read-only file system"):
        train(config(steps=100, checkpoint_interval=1), tmp_path / "run", quiet=True)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 10
    assert len(tried) == saving.FAILURES == 3


def test_saving_does_not_wait_and_writes_what_was_there(config, tmp_path, monkeypatch):
    gate, real = threading.Event(), saving.save_checkpoint

    def slow(*args):
        assert gate.wait(60)
        return real(*args)

    steps = []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            gate.set()  # another step has been made since the first checkpoint was begun
        return batch_gradients(*args, **kwargs)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    monkeypatch.setattr(session, "batch_gradients", step)
    train(config(checkpoint_interval=2, eval_interval=0, keep_checkpoints=9, steps=5), tmp_path / "a", quiet=True)
    gate.set()
    train(
        config(checkpoint_interval=2, eval_interval=0, keep_checkpoints=9, steps=5, background_saving=False),
        tmp_path / "b", quiet=True,
    )  # fmt: skip
    for name in ("step-00000002", "step-00000004", "step-00000005"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = ((tmp_path / run / "checkpoints" / name / file).read_bytes() for run in "ab")
            assert one == other, (name, file)


HOSTILE = [
    ("manifest.json", '{"../../../etc/passwd": {"bytes": 1, "sha256": ""}}', "no name of a file in this folder"),
    ("manifest.json", '{"/etc/passwd": {"bytes": 1, "sha256": ""}}', "no name of a file in this folder"),
    ("manifest.json", '{"a/../b": {"bytes": 1, "sha256": ""}}', "no name of a file in this folder"),
    ("manifest.json", '{"state.json": {"bytes": 1e400, "sha256": ""}}', "not a manifest"),
    ("manifest.json", "[" * 200_000, "not JSON"),
    ("manifest.json", "1", "object was expected"),
    ("manifest.json", " " * 2_000_000, "longer than"),
    ("state.json", '{"step": -1}', "missing"),
    ("state.json", '{"step": -1, "seconds": 0, "tokens": 0, "dtype": "auto", "data": ""}', "step cannot be -1"),
    ("state.json", '{"step": 1, "seconds": NaN, "tokens": 0, "dtype": "auto", "data": ""}', "seconds cannot be nan"),
    (
        "state.json",
        '{"step": 1, "seconds": 1' + "0" * 400 + ', "tokens": 0, "dtype": "", "data": ""}',
        "seconds cannot",
    ),
    ("state.json", '{"step": 1, "seconds": 0, "tokens": 0, "dtype": "exec", "data": ""}', "dtype cannot be exec"),
    ("state.json", '{"step":1,"seconds":0,"tokens":0,"dtype":"auto","data":"","x":1}', "unknown entry 'x'"),
    ("config.json", '{"architecture": "Transformer", "num_layers": 9999}', "another model"),
    ("model.safetensors", b"\xff" * 100, "model.safetensors"),
    ("optimizer.safetensors", (1 << 40).to_bytes(8, "little") + b"{}", "optimizer.safetensors: damaged"),
    ("optimizer.safetensors", b"\x80\x04\x95cos\nsystem\n", "optimizer.safetensors: damaged"),  # a pickle
]


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE)
def test_a_checkpoint_made_to_harm_is_refused_even_with_its_own_manifest(finished, name, content, message):
    newest = finished / "checkpoints" / "step-00000006"
    (newest / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name != "manifest.json":
        (newest / "manifest.json").unlink()
        write_manifest(newest)
    with pytest.raises(InputError, match=message):
        resume(newest, quiet=True)


@pytest.mark.parametrize("change", ["drop", "reshape", "stranger"])
def test_optimizer_state_that_does_not_fit_is_refused(finished, change):
    newest = finished / "checkpoints" / "step-00000006"
    tensors = load_file(newest / "optimizer.safetensors")
    key = next(name for name in tensors if name.endswith("exp_avg"))
    if change == "drop":
        del tensors[key]
    elif change == "reshape":
        tensors[key] = tensors[key].flatten()[:1].clone()
    else:
        tensors["nobody:exp_avg"] = tensors[key].clone()
    save_tensors(tensors, newest / "optimizer.safetensors")
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    with pytest.raises(InputError, match="step-00000006: optimizer state"):
        resume(newest, quiet=True)


def test_settings_that_were_changed_by_hand_are_refused(finished):
    file = finished / "config.toml"
    file.write_text(file.read_text().replace("batch_size = 4", "batch_size = 2").replace("micro_batch_size = 2\n", ""))
    with pytest.raises(InputError, match=r"config.toml: batch_size is 2, but .*step-00000006 was made with 4"):
        resume(finished, quiet=True)


@pytest.mark.parametrize(
    ("given", "changes"),
    [({}, {"steps": None}), ({"steps": None, "epochs": 0.05}, {"steps": None, "max_seconds": None})],
)
def test_a_run_is_not_resumed_without_an_end(config, tmp_path, given, changes):
    train(config(**given), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(InputError, match=r"^command line: steps: without them and max_seconds the run has no end"):
        resume(tmp_path / "run", changes, quiet=True)
    assert (tmp_path / "run" / "config.toml").read_text() == before
    (tmp_path / "run" / "config.toml").write_text(re.sub("(?m)^steps = .*\n", "", before))
    with pytest.raises(InputError, match=r"config.toml: steps: without them and max_seconds"):
        resume(tmp_path / "run", quiet=True)


def test_a_run_without_a_checkpoint_and_no_run_at_all_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match="no checkpoint"):
        find_checkpoint(tmp_path)


def test_changed_data_are_refused(finished, tmp_path):
    other = prepare(Corpus("o", [prose(80, 5)], [prose(9, 6)]), tmp_path / "other", vocab_size=300)
    shutil.rmtree(finished / "data")
    shutil.copytree(tmp_path / "other", finished / "data")
    assert other.tokenizer.vocab_size
    with pytest.raises(InputError, match="made from other training tokens"):
        resume(finished, quiet=True)


def test_a_folder_that_holds_a_run_is_not_trained_in_again(config, finished):
    with pytest.raises(InputError, match="holds a run already"):
        train(config(), finished, quiet=True)


def test_a_folder_that_is_renamed_while_it_is_saved_to_is_an_error_of_the_disk(tmp_path, monkeypatch):
    folder, real = tmp_path / "checkpoints", checkpoint.write_text

    def rename(path, text):
        real(path, text)
        folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(checkpoint, "write_text", rename)
    state = State(step=2, seconds=0.0, tokens=0, dtype="float32", data="")
    with pytest.raises(FileNotFoundError, match=r"vanished as soon as it was saved: '.*step-00000002'"):
        save_checkpoint(folder, state, lambda folder: None, Keep(newest=2))


@pytest.mark.parametrize(("keep", "stay"), [(Keep(newest=2), [4, 5]), (Keep(newest=1, best=1), [5])])
def test_what_a_run_saved_on_a_course_that_it_has_left_goes(tmp_path, keep, stay):
    def save(step, score):
        state = State(step=step, seconds=0.0, tokens=0, dtype="float32", data="", score=score)
        save_checkpoint(tmp_path, state, lambda folder: None, keep)

    for step, score in ((2, 0.5), (4, 0.4), (6, 0.9)):
        save(step, score)
    save(5, 0.3)  # resumed from step 4 or before
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == stay
