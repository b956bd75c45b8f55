"""Steps that are skipped, and dropout that depends on the row alone."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy import TOY, weights

from fastllm.config import InputError
from fastllm.models import Transformer
from fastllm.ops.shared.philox import rows_kept
from fastllm.training import Diverged, resume, train
from fastllm.training.checkpoints.checkpoint import State, checkpoints, read_state
from fastllm.training.dropout import RowDropout, key_dropout, set_first_row
from fastllm.training.guard import HISTORY, Guard, deviation
from fastllm.training.objectives import CausalLM
from fastllm.training.reports.progress import read_metrics
from fastllm.training.session import DataChanged

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture
def poison(monkeypatch):
    """``poison(first, last, factor)``: multiply the loss of those batches, counted from 1."""
    real_batch, real_losses = CausalLM.batch, CausalLM.losses
    now = [0]

    def poison(first, last, factor=math.nan):
        def batch(self, step, done=1.0):
            now[0] = step + 1
            return real_batch(self, step, done)

        def losses(model, batch):
            result = real_losses(model, batch)
            return {"loss": result["loss"] * factor} if first <= now[0] <= last else result

        monkeypatch.setattr(CausalLM, "batch", batch)
        monkeypatch.setattr(CausalLM, "losses", staticmethod(losses))

    return poison


def test_a_step_that_is_not_finite_is_skipped_counted_and_its_batch_kept(config, tmp_path, poison, capsys):
    poison(3, 4)
    train(config(checkpoint_interval=3, keep_checkpoints=9), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert "step 3 skipped: loss nan, gradient norm nan" in capsys.readouterr().out
    batch = load_file(tmp_path / "run" / "skipped" / "step-00000003.safetensors")
    assert batch["tokens"].shape == (16, TOY.context_length // 4)  # the first half has short windows
    assert json.loads((tmp_path / "run" / "skipped" / "step-00000004.json").read_text())["loss"] == "nan"
    states = [read_state(path) for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert [(state.step, state.skipped, state.in_a_row) for state in states] == [(3, 1, 1), (6, 2, 0)]
    one, other = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{n}" / "optimizer.safetensors") for n in (3, 6)
    )
    assert {float(v) for k, v in one.items() if k.endswith(":step")} == {2.0}
    assert {float(v) for k, v in other.items() if k.endswith(":step")} == {4.0}


def test_too_many_in_a_row_stop_the_run_and_lose_nothing(config, tmp_path, poison):
    with pytest.MonkeyPatch.context():
        poison(4, 99)
        with pytest.raises(Diverged, match=r"step 5: loss nan.*2 in a row were skipped.*batches are in .*skipped"):
            train(config(max_skipped=2), tmp_path / "run", quiet=True)
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert read_state(path).step == 4  # three taken, one skipped
    poison(1, 0)
    train(config(), tmp_path / "whole", quiet=True)
    poison(4, 4)
    train(config(), tmp_path / "one", quiet=True)
    poison(1, 0)
    assert resume(tmp_path / "run", quiet=True).steps == 6
    assert weights(tmp_path / "run") == weights(tmp_path / "one") != weights(tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(config, tmp_path):
    with pytest.raises(Diverged, match="lower the learning rate"):
        train(config(lr=1e38, muon_lr=1e38, steps=20, checkpoint_interval=1), tmp_path / "run", quiet=True)
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(value.isfinite().all() for value in load_file(path / "model.safetensors").values())


def test_an_outlier_is_judged_by_the_last_steps_and_the_memory_is_the_state():
    state = State(0, 0.0, 0, "float32", "")
    guard = Guard(None, state, outlier=6.0, limit=9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(HISTORY * 2):
        assert guard.accept(3.0 + 0.1 * float(torch.randn((), generator=draw)), 1.0, {}) is None
    assert len(state.losses) == HISTORY
    again = Guard(None, replace(state), outlier=6.0, limit=9)
    for one in (guard, again):
        assert "standard deviations above the last 128" in one.accept(5.0, 1.0, {})
        assert "gradient norm" in one.accept(3.0, 5.0, {})
    assert state.skipped == state.in_a_row == 2
    assert guard.accept(1.0, 0.5, {}) is None  # far below is welcome
    assert state.in_a_row == 0
    # With fewer than a quarter of the steps too little is seen.
    seen = [1.0, 2.0] * (HISTORY // 8)
    assert deviation(100.0, seen[1:]) == 0.0
    assert deviation(100.0, seen) == pytest.approx(98.5 / 0.5)


def test_a_bounded_number_of_batches_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("fastllm.training.guard.KEPT", 2)
    state = State(0, 0.0, 0, "float32", "")
    guard = Guard(tmp_path, state, outlier=None, limit=9)
    for step in range(4):
        state.step = step
        assert guard.accept(math.nan, 1.0, {"tokens": torch.zeros(1)}) is not None
    assert state.skipped == 4
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["step-00000001.json", "step-00000002.json"]


def test_a_spiking_loss_is_skipped(config, tmp_path, poison):
    poison(40, 40, 50.0)
    train(config(steps=42, outlier=8.0, eval_interval=0), tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line.get("skipped_because")]
    assert [line["step"] for line in lines] == [40]


def test_a_rows_mask_is_its_own_whatever_rows_are_with_it():
    key = torch.tensor(7)
    whole = rows_kept(key, torch.arange(16), 1001, 0.3)
    for rows in (torch.arange(5, 9), torch.tensor([15, 0]), torch.arange(0)):
        assert torch.equal(rows_kept(key, rows, 1001, 0.3), whole[rows])
    assert torch.equal(rows_kept(key, torch.arange(16), 999, 0.3), whole[:, :999])
    assert not torch.equal(rows_kept(key + 1, torch.arange(16), 1001, 0.3), whole)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_masks_keep_the_right_share_and_are_independent(p):
    keep = rows_kept(torch.tensor(3), torch.arange(300), 1003, p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(keep.mean() - (1 - p)) <= 5 * sigma / math.sqrt(keep.numel())
    if 0 < p < 0.9:
        for view in (keep[:, :300], keep[:, :300].t()):
            correlation = torch.corrcoef(view).fill_diagonal_(0)
            assert correlation.abs().max() < 6 / math.sqrt(view.shape[1])
            assert correlation.std() < 1.1 / math.sqrt(view.shape[1])


def test_dropout_scales_and_is_recomputed_under_checkpointing_and_by_micro_batch():
    module = RowDropout(0.5, torch.zeros((), dtype=torch.int64))
    x = torch.ones(6, 40, requires_grad=True)
    torch.manual_seed(1)
    out = module(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out)
    for rows in (1, 2, 3):
        parts = []
        for first in range(0, 6, rows):
            set_first_row(module, first)
            torch.manual_seed(1)
            parts.append(torch.utils.checkpoint.checkpoint(module, x[first : first + rows], use_reentrant=False))
        set_first_row(module, 0)
        assert torch.equal(torch.cat(parts), out)
    assert module.eval()(x) is x
    model = key_dropout(Transformer(TOY))
    assert sum(type(m) is RowDropout for m in model.modules()) == 3


def test_the_micro_batch_may_change_and_only_the_order_of_sums_does(config, tmp_path):
    for name, rows in (("whole", None), ("by one", 1)):
        train(config(micro_batch_size=rows, optimizer="adamw"), tmp_path / name, quiet=True)
    train(config(micro_batch_size=2, steps=3, optimizer="adamw"), tmp_path / "changed", quiet=True)
    resume(tmp_path / "changed", {"steps": 6, "micro_batch_size": 1}, quiet=True)
    losses = {
        name: [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "lr" in line]
        for name in ("whole", "by one")
    }
    assert losses["whole"] == pytest.approx(losses["by one"], rel=1e-5)


# Data that change under a run


def at_step(monkeypatch, number, act):
    """Call ``act`` when the batch of step ``number``, counted from 1, is made."""
    real = CausalLM.batch

    def batch(self, step, done=1.0):
        if step + 1 == number:
            act()
        return real(self, step, done)

    monkeypatch.setattr(CausalLM, "batch", batch)


def test_a_token_file_that_vanishes_is_told_and_the_run_ends_the_same(config, tmp_path, monkeypatch, capsys):
    train(config(), tmp_path / "whole", quiet=True)
    (file,) = (tmp_path / "whole" / "data").glob("train*.bin")
    gone = tmp_path / "run" / "data" / file.name
    with monkeypatch.context() as patch:
        at_step(patch, 3, gone.unlink)
        train(config(), tmp_path / "run", quiet=True)
    assert f"{gone}: deleted during the run, which goes on" in capsys.readouterr().err
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    with pytest.raises(InputError, match=rf"{file.name}: No such file"):
        resume(tmp_path / "run", {"steps": 7}, quiet=True)


def test_a_run_whose_folder_vanishes_makes_it_again_and_says_what_is_lost(config, tmp_path, monkeypatch, capsys):
    train(config(), tmp_path / "whole", quiet=True)
    run = tmp_path / "run"
    at_step(monkeypatch, 3, lambda: shutil.rmtree(run))
    train(config(), run, quiet=True)
    said = capsys.readouterr().err
    assert f"{run / 'config.toml'}: deleted during the run; written again" in said
    assert "the run cannot be resumed without it" in said
    assert (run / "config.toml").read_text() == (tmp_path / "whole" / "config.toml").read_text()
    assert weights(run) == weights(tmp_path / "whole")


# Prints whether the lock was to be had, and keeps it until its input ends.
TAKE = """
import fcntl, sys
with open(sys.argv[1], "ab") as lock:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("refused", flush=True)
    else:
        print("taken", flush=True)
        sys.stdin.read()
"""


def lock_of(run):
    """Another process that tries to take a run's lock, and whether it did."""
    command = [sys.executable, "-c", TAKE, run / "lock"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def release(process):
    process.communicate()


def test_a_run_whose_folder_vanishes_keeps_others_off_the_new_one(config, tmp_path, monkeypatch):
    run, answers = tmp_path / "run", []

    def other():
        process, answer = lock_of(run)
        release(process)
        answers.append(answer)

    at_step(monkeypatch, 2, lambda: shutil.rmtree(run))
    at_step(monkeypatch, 5, other)
    train(config(checkpoint_interval=3), run, quiet=True)
    assert answers == ["refused"]


def test_a_run_whose_folder_another_process_has_taken_leaves_it_alone(config, tmp_path, monkeypatch):
    run, others = tmp_path / "run", []

    def replaced():
        shutil.rmtree(run)
        run.mkdir()
        others.append(lock_of(run))

    at_step(monkeypatch, 3, replaced)
    try:
        with pytest.raises(InputError, match="run: another process is writing there"):
            train(config(checkpoint_interval=3), run, quiet=True)
        assert [answer for _, answer in others] == ["taken"]
        assert not {"config.toml", "checkpoints", "model"} & {path.name for path in run.iterdir()}
    finally:
        for process, _ in others:
            release(process)


def test_a_token_file_that_is_changed_stops_the_run_which_is_saved_first(config, tmp_path, monkeypatch):
    train(config(), tmp_path / "whole", quiet=True)
    (file,) = (tmp_path / "whole" / "data").glob("train*.bin")
    path = tmp_path / "run" / "data" / file.name
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: path.write_bytes(file.read_bytes() + b"more"))
        with pytest.raises(DataChanged, match=rf"{file.name}: [\d,]+ bytes when the run began, now [\d,]+"):
            train(config(), tmp_path / "run", quiet=True)
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert read_state(checkpoint).step == 3
    path.write_bytes(file.read_bytes())
    resume(tmp_path / "run", quiet=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
