"""Training that is killed with SIGKILL, at any moment and while it saves, ends as if nothing had happened."""

import random
import shutil
import time
from dataclasses import replace

import pytest
import toy
from safetensors.torch import load_file
from thorough import THOROUGH
from toy import weights

from fastllm.training.checkpoints.checkpoint import checkpoints
from fastllm.training.objectives import ObjectiveConfig, fit_model
from fastllm.training.reports.progress import read_metrics

KILLS = 5


def kill_at_random(process, run, draw, while_saving):
    """SIGKILL after a random while, or in the middle of one of the next checkpoints; False if it ended before."""
    folder = run / "checkpoints"
    deadline = time.monotonic() + draw.uniform(0.02, 0.35)
    to_see = draw.randint(1, 3)
    seen, before = 0, None
    while process.is_alive():
        if while_saving:
            now = next(folder.glob(".step-*.tmp"), None)
            if now is not None and now != before:
                seen, before = seen + 1, now
                if seen >= to_see:
                    time.sleep(draw.choice([0, 0.001, 0.004]))
                    break
        elif time.monotonic() > deadline and (run / "metrics.jsonl").exists():
            break
        time.sleep(0.0005)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


def runs(config, tmp_path, objective, dtype, micro_batches=(2,), **training):
    """An undisturbed run, and one that was killed :data:`KILLS` times and resumed with other settings each time."""
    draw = random.Random(objective + dtype)
    start = toy.processes().Process
    settings = config(steps=60, dtype=dtype, checkpoint_interval=4, eval_interval=10, micro_batch_size=2, **training)
    learns = ObjectiveConfig(objective)
    settings = replace(settings, objective=learns, model=fit_model(learns, settings.model))
    whole = start(target=toy.train_or_resume, args=(settings, tmp_path / "whole", {}))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    run = tmp_path / "run"
    kills, torn = 0, 0
    while kills < KILLS:
        # How often one looks and saves changes from one life to the next, and with micro_batches how a batch is cut.
        changes = {"eval_interval": draw.choice([0, 3, 10]), "checkpoint_interval": draw.choice([2, 4, 5])}
        changes["micro_batch_size"] = draw.choice(micro_batches)
        process = start(target=toy.train_or_resume, args=(settings, run, changes))
        process.start()
        if kill_at_random(process, run, draw, while_saving=kills % 2 == 0):
            kills += 1
            torn += any((run / "checkpoints").glob(".step-*.tmp"))
        else:
            assert process.exitcode == 0
            shutil.rmtree(run)  # it came to its end: begin again
    last = start(target=toy.train_or_resume, args=(settings, run, {"eval_interval": 10}))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert torn, "no kill fell into a save"
    return run, tmp_path / "whole"


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        ("causal", "float32"), ("mlm", "bfloat16"),
        pytest.param("causal", "bfloat16", marks=THOROUGH), pytest.param("mlm", "float32", marks=THOROUGH),
    ],
)  # fmt: skip
def test_killed_five_times_a_run_ends_bitwise_like_an_undisturbed_one(config, tmp_path, objective, dtype):
    both = runs(config, tmp_path, objective, dtype)
    assert weights(both[0]) == weights(both[1])
    states = [checkpoints(path / "checkpoints")[-1] / "optimizer.safetensors" for path in both]
    assert states[0].read_bytes() == states[1].read_bytes()
    lines = [read_metrics(path / "metrics.jsonl") for path in both]
    for key in ("loss", "grad_norm", "lr"):
        assert len({tuple(line[key] for line in one if "lr" in line) for one in lines}) == 1, key
    assert lines[0][-1]["validation_loss"] == lines[1][-1]["validation_loss"]


@THOROUGH
@pytest.mark.parametrize("objective", ["causal", "mlm"])
# Losses and weights, of their size; measured over sixty steps: 2e-7 and 6e-7, and with Muon 2e-4 and 5e-2: its
# orthogonal factor is computed in bf16, where another order of a sum becomes another rounding.
@pytest.mark.parametrize(("optimizer", "loss", "weight"), [("adamw", 2e-6, 6e-6), ("muon", 2e-3, 0.2)])
def test_with_another_micro_batch_in_each_life_only_the_order_of_sums_differs(
    config, tmp_path, objective, optimizer, loss, weight
):
    both = runs(config, tmp_path, objective, "float32", (1, 2, 4), optimizer=optimizer)
    found, expected = ([line for line in read_metrics(path / "metrics.jsonl") if "lr" in line] for path in both)
    assert [(line["step"], line["tokens"], line["lr"]) for line in found] == [
        (line["step"], line["tokens"], line["lr"]) for line in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=loss)
    final, whole = (load_file(path / "model" / "model.safetensors") for path in both)
    for name, tensor in whole.items():
        assert (final[name] - tensor).norm() <= weight * tensor.norm(), name
