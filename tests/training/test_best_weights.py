"""The average of the weights, and the best of them in validation: what is scored, saved, and gone on from."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import weights

from fastllm.config import InputError
from fastllm.training import resume, train
from fastllm.training.average import WeightAverage
from fastllm.training.checkpoints.checkpoint import checkpoints, read_state
from fastllm.training.config import TrainingConfig
from fastllm.training.objective import Evaluation
from fastllm.training.objectives import CausalLM

pytestmark = pytest.mark.usefixtures("short_runs")


def test_the_average_is_of_all_weights_and_forgets_the_first_soon():
    model = nn.Linear(2, 2)
    first = model.weight.detach().clone()
    average, expected = WeightAverage(model, 0.9), first
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (first + step + 1)
    torch.testing.assert_close(model.weight.detach(), first + 30)
    with average.applied() as trained:
        torch.testing.assert_close(model.weight.detach(), expected)
        torch.testing.assert_close(trained["weight:weights"], first + 30)
        saved = {name: tensor.clone() for name, tensor in trained.items()}
        loaded = nn.Linear(2, 2)
        loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.weight.detach(), first + 30)
    other = WeightAverage(loaded, 0.9)
    assert list(other.load({**saved, "weight:step": torch.ones(())})) == ["weight:step"]
    assert torch.equal(loaded.weight, model.weight)
    with pytest.raises(ValueError, match="trained weights of bias: missing"):
        other.load({"weight:weights": saved["weight:weights"]})
    other.take()
    torch.testing.assert_close(loaded.weight.detach(), expected)
    with WeightAverage(model, 0.0).applied() as trained:
        assert not trained
        assert torch.equal(model.weight, first + 30)


def test_the_average_is_scored_and_saved_and_a_resumed_run_ends_bitwise_alike(config, tmp_path):
    settings = {"ema_decay": 0.8, "eval_interval": 2, "checkpoint_interval": 3}
    whole, resumed, plain = (tmp_path / name for name in ("whole", "resumed", "plain"))
    result = train(config(**settings), whole, quiet=True)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    again = resume(resumed, quiet=True)
    assert again.validation_loss == result.validation_loss
    assert weights(whole) == weights(resumed)
    last = [run / "checkpoints" / "step-00000006" for run in (whole, resumed)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    assert (last[0] / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # What is trained goes the way of a run without an average.
    other = train(config(**{**settings, "ema_decay": 0.0}), plain, quiet=True)
    assert other.validation_loss != result.validation_loss
    trained, alone = load_file(last[0] / "optimizer.safetensors"), load_file(plain / "model" / "model.safetensors")
    assert all(torch.equal(trained[f"{name}:weights"], alone[name]) for name in alone)


@pytest.fixture
def scored(monkeypatch):
    """Evaluations of the whole split that give these scores, one after the other, and the weights that they saw."""
    seen = []

    def use(scores):
        left = iter(scores)

        def evaluate(self, model, rows, dtype, limit):
            score = next(left)
            seen.append((score, {name: p.detach().clone() for name, p in model.named_parameters()}))
            return Evaluation(score, 1, {"bits_per_byte": score})

        monkeypatch.setattr(CausalLM, "evaluate", evaluate)
        return seen

    return use


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.8}])
def test_patience_stops_the_run_and_keeps_the_best_weights(config, tmp_path, scored, settings):
    settings = {"eval_interval": 1, "eval_windows": 0, "checkpoint_interval": 0, "keep_checkpoints": 1, **settings}
    seen = scored([3.0, 1.0, 2.0, 1.0, 1.5])
    run = tmp_path / "run"
    result = train(config(patience=2, steps=20, **settings), run, quiet=True)
    # Equal is not better; the fifth evaluation is of what is taken back.
    assert (result.steps, result.validation_loss, len(seen)) == (4, 1.5, 5)
    best = seen[1][1]
    assert all(torch.equal(best[name], seen[4][1][name]) for name in best)
    saved = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    assert [path.name[-1] for path in checkpoints(run / "checkpoints")] == ["2", "4"]
    state = read_state(run / "checkpoints" / "step-00000004")
    assert (state.best, state.waited) == (-1.0, 2)
    # It stands where it stopped, not where it was best; more patience goes on from there.
    seen = scored([0.5, 2.0, 2.0, 2.0, 0.5])
    result = resume(run, {"patience": 3}, quiet=True)
    assert result.steps == 8
    assert [score for score, _ in seen[5:]] == [0.5, 2.0, 2.0, 2.0, 0.5]


def test_patience_needs_whole_evaluations_and_unsharded_weights():
    for wrong in ({"eval_windows": 128}, {"eval_windows": 0, "eval_interval": 0}):
        with pytest.raises(InputError, match="patience: needs evaluations during the run"):
            TrainingConfig(patience=1, **wrong)
    with pytest.raises(InputError, match="patience: the best weights are taken back by one process or ddp"):
        TrainingConfig(patience=1, eval_windows=0, parallel="fsdp")
    assert replace(TrainingConfig(), patience=2, eval_windows=0).patience == 2


def test_less_is_better_of_losses_and_more_of_the_others():
    for main, sign in (("bits_per_byte", -1), ("perplexity", -1), ("mlm_loss", -1), ("accuracy", 1), ("f1", 1)):
        assert Evaluation(1.0, 1, {main: 0.5}, main).signed_score == sign * 0.5
