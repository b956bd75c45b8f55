"""Training in float16: the loss's scale, its place in a checkpoint, and which devices take it."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cells import setting
from safetensors.torch import load_file

from fastllm.config import InputError
from fastllm.kernels import device as kernels_device
from fastllm.training import launch, loss_scale
from fastllm.training.checkpoints.checkpoint import State, checkpoints, read_state
from fastllm.training.config import TrainingConfig
from fastllm.training.device import autocast, keep_random_state, narrow_dtype, pick_device
from fastllm.training.loss_scale import LossScale
from fastllm.training.measure import faster_dtype
from fastllm.training.parallel.distributed import DataParallel
from fastllm.training.step import StepSettings, batch_gradients

pytestmark = pytest.mark.usefixtures("short_runs")


def _state(**more):
    return State(step=0, seconds=0.0, tokens=0, data="", **{"dtype": "float16", **more})


def test_the_scale_halves_on_overflow_and_doubles_after_quiet(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    state = _state()
    scale = LossScale(state)
    assert scale.value == 2.0**16
    assert "65536, now 32768" in scale.overflow(1.0, float("inf"))
    for _ in range(3):
        assert scale.value == 2.0**15
        assert scale.overflow(1.0, 0.5) is None
    assert scale.value == 2.0**16
    # The loss itself is the guard's business, and so is a gradient that no scale makes finite.
    assert scale.overflow(float("nan"), float("nan")) is None
    state.loss_scale = loss_scale.MIN_SCALE
    assert scale.overflow(1.0, float("nan")) is None
    assert LossScale(_state(dtype="bfloat16")).value == 1.0
    assert LossScale(_state(loss_scale=8.0)).value == 8.0
    largest = LossScale(_state(loss_scale=loss_scale.MAX_SCALE))
    for _ in range(4):
        largest.overflow(1.0, 0.5)
    assert largest.value == loss_scale.MAX_SCALE


def test_the_rule_is_torchs(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 4)
    scaler = torch.amp.GradScaler("cpu", growth_interval=4)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale(_state())
    for norm in (1.0, float("inf"), 1.0, 1.0, float("inf"), *[1.0] * 9):
        assert ours.value == scaler.get_scale()
        scaler.scale(torch.zeros(()))
        parameter.grad = torch.full((1,), norm)
        scaler.step(optimizer)
        scaler.update()
        ours.overflow(1.0, norm)


def _weights(folder):
    return load_file(checkpoints(folder / "checkpoints")[-1] / "model.safetensors")


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_skips_what_overflows_and_resumes_exactly(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**40)  # so that the first steps overflow
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    settings = config(steps=40, dtype="float16", checkpoint_interval=25, keep_checkpoints=5)
    launch.train(settings, tmp_path / "whole", quiet=True)
    lines = [line for line in _metrics(tmp_path / "whole") if "loss" in line]
    skipped = [line["step"] for line in lines if "skipped_because" in line]
    assert skipped[0] == 1
    assert len(skipped) < 30
    assert lines[-1]["loss"] < lines[0]["loss"]
    half, *_ = checkpoints(tmp_path / "whole" / "checkpoints")
    state = read_state(half)
    assert state.loss_scale < 2.0**40
    assert state.skipped == 0  # the guard has nothing to say
    # Stopped at a checkpoint, the run goes on as if it had not been.
    launch.train(replace(settings, training=replace(settings.training, steps=40)), tmp_path / "cut", quiet=True)
    for later in checkpoints(tmp_path / "cut" / "checkpoints")[1:]:
        shutil.rmtree(later)
    (tmp_path / "cut" / "checkpoints" / "latest").write_text(f"{half.name}\n")
    launch.resume(tmp_path / "cut", {}, quiet=True)
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_device_takes_the_16_bits_that_it_has(monkeypatch):
    t4, a100 = kernels_device.OTHER_GPUS["sm_75"], kernels_device.GPUS[80]
    for gpu, dtype in ((t4, "float16"), (a100, "bfloat16")):
        monkeypatch.setattr(kernels_device, "_gpu", lambda index, gpu=gpu: gpu)
        assert narrow_dtype(torch.device("cuda", 0)) == dtype
    assert autocast(torch.device("cpu"), "float16").fast_dtype == torch.float16


def test_auto_times_what_the_device_has(config, monkeypatch):
    tried = []
    monkeypatch.setattr("fastllm.training.measure.narrow_dtype", lambda device: "float16")
    monkeypatch.setattr(
        "fastllm.training.measure.autocast", lambda device, dtype: tried.append(dtype) or autocast(device, dtype)
    )
    model = torch.nn.Linear(3, 3)
    objective = SimpleNamespace(losses=lambda model, batch: {"loss": model(batch["x"]).float().sum()})
    chosen, times = faster_dtype(objective, model, {"x": torch.randn(4, 3)}, seconds=0.01)
    assert set(tried) == set(times) == {"float32", "float16"}
    assert chosen in times


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    if (torch.backends.mps if name == "mps" else getattr(torch, name)).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(InputError, match=f"device: {name} was asked for"):
        pick_device(name)


def test_random_state_is_kept():
    before = torch.get_rng_state()
    with keep_random_state(torch.device("cpu")):
        torch.randn(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_more_ranks_do_not_bring_an_overflow_nearer(tmp_path, dtype):
    """Rank 0 of four: the others are silent, so each gradient is what the mean over one rank gives, times four."""
    objective, model = setting("causal", "none", "transformer", tmp_path)
    batch, largest = objective.batch(0), []
    settings = StepSettings(micro_batch_size=2, clip=0.0, dtype=dtype, seed=0, loss_scale=2.0**10)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = DataParallel(TrainingConfig(), "cpu")
        ranks.parts = ranks.averaged = 4
        ranks.attach(model, objective)
        model.token_embedding.register_forward_hook(
            lambda module, args, out: out.register_hook(lambda gradient: largest.append(gradient.abs().max())) and None
        )
        found = batch_gradients(objective, model, batch, settings, ranks=ranks)
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        ranks.averaged = 1
        alone = batch_gradients(objective, model, batch, settings, ranks=ranks)
        ranks.close()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found.norm, 4 * alone.norm)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, 4 * parameter.grad)
    count = len(largest) // 2
    assert max(largest[:count]) == (1 if dtype == "float16" else 4) * max(largest[count:])
