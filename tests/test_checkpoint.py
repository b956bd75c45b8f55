"""Exact resume, signals, checkpoints whole and damaged."""

import errno
import os
import shutil
import signal

import pytest
import torch
from prose import prose
from toy import weights

from fastllm.config import InputError
from fastllm.data import Corpus, prepare
from fastllm.training import loop, resume, train
from fastllm.training.checkpoint import check, checkpoints, find_checkpoint
from fastllm.training.clock import StopRequest
from fastllm.training.progress import read_metrics
from fastllm.training.step import train_step

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_steps_end_and_the_run_goes_on_exactly(config, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    train(config(), tmp_path / "whole", quiet=True)

    def step_and_signal(*args, **kwargs):
        os.kill(os.getpid(), number)
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_and_signal)
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


# Checkpoints


@pytest.fixture
def finished(config, tmp_path):
    train(config(checkpoint_interval=3), tmp_path / "run", quiet=True)
    return tmp_path / "run"


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_in_half_is_named_and_refused_with_the_one_to_use(finished, name):
    newest = finished / "checkpoints" / "step-00000006"
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"step-00000006/{name}: .*damaged.*step-00000003 is whole"):
        find_checkpoint(finished)
    if name != "manifest.json":
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"step-00000006/{name}: .*SHA-256"):
            find_checkpoint(finished)
        (newest / name).unlink()
        with pytest.raises(InputError, match=rf"step-00000006/{name}: damaged: missing"):
            find_checkpoint(finished)
    assert find_checkpoint(newest.with_name("step-00000003")) == newest.with_name("step-00000003")


def test_resuming_from_an_older_checkpoint_leaves_the_damaged_newer_one_behind(finished):
    expected = weights(finished)
    os.truncate(finished / "checkpoints" / "step-00000006" / "model.safetensors", 100)
    (finished / "checkpoints" / ".step-00000005.123.tmp").mkdir()
    assert resume(finished / "checkpoints" / "step-00000003", quiet=True).steps == 6
    assert weights(finished) == expected
    check(finished / "checkpoints" / "step-00000006")
    assert sorted(os.listdir(finished / "checkpoints")) == ["step-00000003", "step-00000006"]


def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_of_a_new_one(config, tmp_path, monkeypatch):
    real, folder = os.fsync, tmp_path / "run" / "checkpoints"

    def full(handle):
        # Only once the first checkpoint is there, and in the middle of the second.
        if (folder / "step-00000002").exists() and any(folder.glob(".step*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train(config(checkpoint_interval=2), tmp_path / "run", quiet=True)
    assert "step-00000004" in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    check(folder / "step-00000002")
    monkeypatch.setattr(os, "fsync", real)
    assert resume(tmp_path / "run", quiet=True).steps == 6


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
