"""Several processes give what one gives: DDP, FSDP2, a vocabulary split over ranks; restarts; a rank that hangs."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cells import cells, setting
from prose import prose
from safetensors.torch import load_file
from several import MODEL, PAIRS
from thorough import THOROUGH
from toy import TOY, shorten_runs, weights

from fastllm.cli import main
from fastllm.config import InputError
from fastllm.models import build_model
from fastllm.training.config import TrainingConfig
from fastllm.training.parallel import distributed, watch
from fastllm.training.parallel.distributed import DataParallel, FullySharded
from fastllm.training.parallel.meta import on_meta
from fastllm.training.parallel.ranks import Ranks
from fastllm.training.reports.progress import read_metrics
from fastllm.training.step import StepSettings, batch_gradients


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text(prose(80))
    (tmp_path / "pairs.jsonl").write_text(PAIRS)


def launch(processes, *program, restarts=0, check=True, **environment):
    """``torchrun`` on this machine; its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone",
        "--max-restarts", str(restarts), "--monitor-interval", "0.2",
    ]  # fmt: skip
    result = subprocess.run(
        [*torchrun, *map(str, program)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def steps(run, key="loss"):
    return torch.tensor([line[key] for line in read_metrics(run / "metrics.jsonl") if "lr" in line])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=THOROUGH)])
def test_ddp_fsdp_and_a_split_vocabulary_train_as_one_process_does(tmp_path, processes):
    launch(processes, Path(__file__).parents[1] / "several.py")
    alone, norm = steps(tmp_path / "alone"), steps(tmp_path / "alone", "grad_norm")
    weights = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    for name in ("ddp", "fsdp", "vocabulary", "bf16"):
        found = steps(tmp_path / name)
        exact = name != "bf16"
        # Only the order of sums differs (in bf16 the roundings, too): 3e-7 of the loss, measured over eight steps, the
        # seventh and eighth of which are made by another way of training and by one process alone.
        torch.testing.assert_close(found[0], alone[0], rtol=1e-6 if exact else 1e-3, atol=0)
        torch.testing.assert_close(
            steps(tmp_path / name, "grad_norm")[0], norm[0], rtol=1e-5 if exact else 1e-2, atol=0
        )
        torch.testing.assert_close(found, alone, rtol=1e-5 if exact else 1e-3, atol=0)
        own = load_file(tmp_path / name / "model" / "model.safetensors")
        assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in weights.items()}
    for name in ("dpo-vocabulary", "dpo-fsdp"):
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(
                steps(tmp_path / name, key), steps(tmp_path / "dpo-alone", key), rtol=1e-4, atol=0
            )


def test_a_rank_that_is_killed_and_one_that_hangs_are_restarted_and_the_run_ends_right(tmp_path):
    result = launch(2, Path(__file__).parents[1] / "faulty.py", restarts=2)
    assert (tmp_path / "faults.txt").read_text() == "killed\nhung\n"
    # Rank 0 finds its peer gone, unless torchrun ends it before it looks.
    assert re.search("rank 0: another process has died or cannot be reached|closing signal SIGTERM", result.stderr)
    assert re.search(r"step 6 has stood still for 3 s; waiting for rank 1 on \S+, at session.py:\d+ in", result.stderr)
    assert len(steps(tmp_path / "run")) == 6
    # "whole" was not disturbed.
    assert torch.equal(steps(tmp_path / "run"), steps(tmp_path / "whole"))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "3"], "batch_size: 3 is not a multiple of 2 processes"),
        (["--tensor-parallel", "3"], "tensor_parallel: 3 does not divide the 2 processes"),
        (["--tensor-parallel", "2", "--parallel", "fsdp"], "tensor_parallel: goes with parallel ddp only"),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_one_line(monkeypatch, capsys, arguments, message):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--out", "run", *MODEL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", *MODEL]) == 2
    assert "under torchrun the run needs a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "fsdp"], "parallel: fsdp needs torchrun"),
        (["--tensor-parallel", "2"], "tensor_parallel: 2 needs torchrun"),
    ],
)
def test_what_takes_several_processes_says_how_they_are_started(capsys, arguments, message):
    assert main(["train", "--out", "run", *MODEL, *arguments]) == 2
    assert f"fastllm train: error: {message} (torchrun --nproc-per-node" in capsys.readouterr().err


def test_auto_resume_goes_on_with_the_same_settings_only(capsys, monkeypatch):
    shorten_runs(monkeypatch.setattr)
    arguments = ["train", "--out", "run", *MODEL, "--auto-resume"]
    assert main([*arguments, "--steps", "2"]) == 0
    assert main([*arguments, "--steps", "4"]) == 0
    assert len(steps(Path("run"))) == 4
    assert main([*arguments, "--lr", "0.5"]) == 2
    assert "lr of the run that is there is another" in capsys.readouterr().err


def test_auto_resume_says_that_the_data_are_newer_than_what_the_run_read(tmp_path, capsys, monkeypatch):
    shorten_runs(monkeypatch.setattr)
    folder = tmp_path / "texts"
    folder.mkdir()
    (tmp_path / "prose.txt").rename(folder / "prose.txt")
    model = [str(folder) if word == "prose.txt" else word for word in MODEL]
    arguments = ["train", "--out", "run", *model, "--auto-resume"]
    assert main([*arguments, "--steps", "1"]) == 0
    assert main([*arguments, "--steps", "2"]) == 0
    assert "newer" not in capsys.readouterr().err
    (folder / "more.txt").write_text(prose(90))
    later = (tmp_path / "run" / "data" / "corpus.json").stat().st_mtime_ns + 1
    os.utime(folder / "more.txt", ns=(later, later))
    assert main([*arguments, "--steps", "3"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{folder / 'more.txt'}: newer than what run read of it; the run goes on with what it read" in said
    # What is gone is not needed.
    (folder / "prose.txt").unlink()
    (folder / "more.txt").unlink()
    assert main([*arguments, "--steps", "4"]) == 0
    assert "newer" not in capsys.readouterr().err
    assert len(steps(Path("run"))) == 4


def test_another_budget_takes_the_place_of_epochs(monkeypatch):
    shorten_runs(monkeypatch.setattr)
    arguments = ["train", "--out", "run", *MODEL, "--auto-resume"]
    assert main([*arguments, "--epochs", "0.02"]) == 0
    passes = len(steps(Path("run")))
    for budget in ("--epochs", "0.02"), ():
        assert main([*arguments, *budget]) == 0
        assert len(steps(Path("run"))) == passes
    assert main([*arguments, "--steps", str(passes + 2)]) == 0
    assert len(steps(Path("run"))) == passes + 2
    seconds = read_metrics(Path("run") / "metrics.jsonl")[-1]["seconds"]
    assert main(["train", "--resume", "run", "--max-seconds", str(seconds + 0.5)]) == 0
    assert len(steps(Path("run"))) > passes + 2


def test_weights_drawn_without_memory_first_are_those_that_would_have_been_drawn():
    recurrent = replace(TOY, encoder="lstm", decoder="lstm", bias=True)
    shapes = (
        TOY,
        replace(TOY, positions="learned", norm="layer", tie_embeddings=False, bias=True),
        recurrent,
        replace(recurrent, encoder="conv", decoder="gru"),
        replace(recurrent, decoder="none", heads=("mlm", "nsp"), segments=2),
    )
    for shape in shapes:
        torch.manual_seed(3)
        expected = build_model(shape)
        torch.manual_seed(3)
        model, draw = on_meta(lambda shape=shape: build_model(shape))
        assert all(parameter.is_meta for parameter in model.parameters())
        draw(torch.device("cpu"))
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        for one, other in zip(expected.buffers(), model.buffers(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [("classify", "conv", "none"), ("mlm+nsp", "lstm", "none"), ("seq2seq", "gru", "lstm"), ("causal", "none", "gru")],
)
def test_every_kind_of_block_is_sharded(tmp_path, name, encoder, decoder):
    objective, alone = setting(name, encoder, decoder, tmp_path)
    settings = StepSettings(micro_batch_size=2, clip=1.0, dtype="float32", seed=0)
    batch = objective.batch(0)
    expected = batch_gradients(objective, alone, batch, settings)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = FullySharded(TrainingConfig(parallel="fsdp"), "cpu")
        torch.manual_seed(0)
        model = ranks.build(lambda: build_model(alone.config), torch.device("cpu"), "float32")
        for own, whole in zip(model.parameters(), alone.parameters(), strict=True):
            with torch.no_grad():
                ranks.copy(own, whole)
        found = batch_gradients(objective, model, batch, settings, ranks=ranks)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.norm, expected.norm)
        for own, whole in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(own.grad.full_tensor(), whole.grad)
        ranks.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("name", "encoder", "decoder"), cells())
def test_ddp_finds_a_gradient_for_every_parameter_without_a_search(tmp_path, recwarn, name, encoder, decoder):
    """A parameter without one would fail the second step; a search that finds none is warned of."""
    objective, model = setting(name, encoder, decoder, tmp_path)
    settings = StepSettings(micro_batch_size=2, clip=1.0, dtype="float32", seed=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = DataParallel(TrainingConfig(), "cpu")
        ranks.attach(model, objective)
        assert not ranks._module.find_unused_parameters
        for step in range(2):
            batch_gradients(objective, model, objective.batch(step), settings, ranks=ranks)
            assert all(parameter.grad is not None for parameter in model.parameters())
        ranks.close()
    finally:
        dist.destroy_process_group()
    assert not [str(warning.message) for warning in recwarn if "find_unused" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--encoder", "gru"],
            "tensor_parallel: splits the vocabulary of a Transformer decoder alone, got encoder gru",
        ),
        (["--decoder", "lstm"], "got encoder none and decoder lstm"),
        (["--positions", "relative"], "tensor_parallel: needs positions rotary, got relative"),
        (["--scale-embeddings"], "tensor_parallel: needs scale_embeddings False, got True"),
        (["--segments", "2"], "tensor_parallel: needs segments 0, got 2"),
        (["--logit-scale", "0.5"], "tensor_parallel: needs logit_scale 1.0, got 0.5"),
    ],
)
def test_models_that_several_processes_cannot_split_are_refused_before_anything_is_written(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(distributed, "_process_group", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(distributed, "VocabParallel", lambda *args: Ranks())
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    objective = ["--objective", "seq2seq"] if "--encoder" in arguments else []
    assert main(["train", "--out", "run", *MODEL, *objective, *arguments, "--tensor-parallel", "2"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_numbers_of_the_host_are_gathered_where_the_callers_group_is_for_gpus_alone():
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="cpu"):
            dist.all_gather([torch.empty(1)], torch.empty(1))
        ranks = DataParallel(TrainingConfig(), "cpu")
        assert ranks.gather([1.5, 2.0]) == [[1.5, 2.0]]
        ranks.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("gpus", "place", "index"), [(1, 0, 0), (1, 3, 0), (4, 3, 3)])
def test_a_process_takes_the_gpu_of_its_place_or_the_only_one_it_is_shown(monkeypatch, gpus, place, index):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "_process_group", lambda *args: pytest.fail("far enough", pytrace=False))
    for name, value in {"WORLD_SIZE": 8, "RANK": place, "LOCAL_RANK": place}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(pytest.fail.Exception, match="far enough"), distributed.joined(TrainingConfig(batch_size=8)):
        pass
    assert taken == [index]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 8, "RANK": 2, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(InputError, match="LOCAL_RANK: expected less than 2, the GPUs of this machine, got 2"),
        distributed.joined(TrainingConfig(batch_size=8)),
    ):
        pass


def test_a_standstill_names_the_rank_that_is_behind_now_not_where_it_was_last_heard_of(monkeypatch, capfd):
    """Rank 0 publishes every second, so that what it said last is old when rank 1 has waited for half a second."""
    store, ended = dist.HashStore(), threading.Event()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(watch.faulthandler, "dump_traceback", lambda **options: None)

    def exit_(code):
        assert code == watch.EXIT_HANG
        hanging._stop.set()
        ended.set()

    monkeypatch.setattr(watch.os, "_exit", exit_)
    monkeypatch.setattr(watch, "PATIENCE", 600)  # on a busy machine too
    ahead, hanging = watch.Watch(0, 2, timeout=5), watch.Watch(1, 2, timeout=0.5)
    ahead.beat(4, "step")
    store.wait(["fastllm/at/0"])
    ahead.beat(5, "step")
    hanging.beat(5, "data")
    assert ended.wait(100)
    ahead.close()
    assert "rank 1: step 6 has stood still for 0.5 s; waiting for rank 1 on" in capfd.readouterr().err
    assert "waiting for rank 1 on" in ahead.verdict()
