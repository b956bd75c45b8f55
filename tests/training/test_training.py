"""Schedule, steps, evaluation, runs."""

import math
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from prose import prose
from toy import TOY, weights

from fastllm.config import InputError
from fastllm.data import Corpus, open_dataset, prepare
from fastllm.models import Transformer
from fastllm.training import RunConfig, TrainingConfig, evaluate, measure, session, train
from fastllm.training import orthogonal as orthogonal_module
from fastllm.training.checkpoints import saving
from fastllm.training.clock import Clock
from fastllm.training.measure import faster_dtype
from fastllm.training.objectives import CausalLM, ObjectiveConfig
from fastllm.training.orthogonal import orthogonal
from fastllm.training.reports import meters
from fastllm.training.reports.progress import read_metrics
from fastllm.training.schedule import lr_scale, progress
from fastllm.training.step import StepSettings, batch_gradients, train_step

pytestmark = pytest.mark.usefixtures("short_runs")


def test_linear_schedule_rises_over_the_warm_up_and_falls_to_the_floor():
    config = TrainingConfig(warmup=0.1, min_lr=0.2)
    assert lr_scale(config, 0.05) == pytest.approx(0.5)
    assert lr_scale(config, 0.1) == pytest.approx(1.0)
    assert lr_scale(config, 0.55) == pytest.approx(0.6)
    assert lr_scale(config, 1.0) == lr_scale(config, 1.5) == pytest.approx(0.2)
    assert 0 < lr_scale(config, 0.0) < 0.1


def test_cosine_and_wsd_have_their_shapes():
    cosine = TrainingConfig(schedule="cosine", warmup=0.0)
    assert [lr_scale(cosine, x) for x in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0])
    wsd = TrainingConfig(schedule="wsd", warmup=0.1, decay=0.4)
    assert [lr_scale(wsd, x) for x in (0.1, 0.6, 0.8, 1)] == pytest.approx([1, 1, 0.5, 0])
    # Together they may be the whole run, and no more.
    whole = TrainingConfig(schedule="wsd", warmup=0.5, decay=0.5)
    assert [lr_scale(whole, x) for x in (0.25, 0.5, 0.75)] == pytest.approx([0.5, 1, 0.5])
    with pytest.raises(InputError, match=r"decay: 0\.5 and warmup 0\.6 are together more than the run"):
        TrainingConfig(schedule="wsd", warmup=0.6, decay=0.5)


def test_progress_follows_the_nearer_budget():
    assert progress(TrainingConfig(steps=10), 5, 1e9) == 0.5
    assert progress(TrainingConfig(max_seconds=10), 10**9, 5.0) == 0.5
    assert progress(TrainingConfig(steps=10, max_seconds=10), 2, 5.0) == 0.5
    assert progress(TrainingConfig(steps=10, max_seconds=10), 7, 5.0) == 0.7


def test_the_default_budget_is_a_time_and_for_a_new_causal_model_passes_over_its_text():
    def budget(*, training=None, **objective):
        found = RunConfig(training=training or TrainingConfig(), objective=ObjectiveConfig(**objective)).with_budget()
        return found.training.steps, found.training.max_seconds, found.training.epochs

    assert budget() == (None, 105, 11)
    assert budget(objective="mlm") == budget(pretrained="model") == (None, 105, None)
    for name, value in {"steps": 3, "max_seconds": 4.0, "epochs": 5.0}.items():
        training = TrainingConfig(**{name: value})
        assert budget(training=training) == (training.steps, training.max_seconds, training.epochs)


def test_the_default_run_has_the_weight_decay_that_was_measured_with_its_passes():
    def decay(*, training=None, **objective):
        config = RunConfig(training=training or TrainingConfig(), objective=ObjectiveConfig(**objective))
        return config.with_budget().training.hidden_decay

    assert decay() == 0.3
    assert decay(training=TrainingConfig(weight_decay=0.2)) == 0.2
    assert decay(training=TrainingConfig(optimizer="adamw")) == decay(training=TrainingConfig(steps=3)) == 0.1
    assert decay(objective="mlm") == decay(pretrained="model") == 0.1


def as_batch(tokens, targets):
    return {"tokens": tokens, "targets": targets}


def whole_batch_gradient(model, tokens, targets):
    model.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_accumulated_loss_and_gradient_are_those_of_the_whole_batch(rows):
    model = Transformer(replace(TOY, dropout=0.0))
    tokens, targets = torch.randint(300, (4, 32)), torch.randint(300, (4, 32))
    targets[0, 3:] = -100  # rows of very different weight
    targets[2] = -100
    loss, gradients = whole_batch_gradient(model, tokens, targets)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    model.zero_grad()
    seen = {}

    class Record:
        def step(self):
            seen["gradients"] = [p.grad.clone() for p in model.parameters()]

    ours, our_norm, terms = train_step(
        CausalLM, model, Record(), as_batch(tokens, targets), StepSettings(rows, 0.0, "float32")
    )
    assert terms["loss"] == ours
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_norm, norm, rtol=1e-5, atol=0)
    for a, b in zip(seen["gradients"], gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_scales_the_gradient_and_reports_its_norm_before():
    model = Transformer(replace(TOY, dropout=0.0))
    batch = as_batch(torch.randint(300, (2, 32)), torch.randint(300, (2, 32)))
    norms = []

    class Record:
        def step(self):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
            model.zero_grad()

    _, free, _ = train_step(CausalLM, model, Record(), batch, StepSettings(2, 0.0, "float32"))
    _, clipped, _ = train_step(CausalLM, model, Record(), batch, StepSettings(2, 0.01, "float32"))
    assert norms[0] == pytest.approx(free)
    assert clipped == pytest.approx(free)
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_orthogonal_factor_is_computed_in_what_the_device_multiplies(dtype, monkeypatch):
    monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device: dtype)
    for matrix in (torch.randn(40, 24), torch.randn(24, 40)):
        factor = orthogonal(matrix)
        assert (factor.dtype, factor.shape) == (dtype, matrix.shape)
        values = torch.linalg.svdvals(factor.float())
        assert 0.3 < values.min() <= values.max() < 1.3


def test_without_products_of_bfloat16_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(measure, "narrow_dtype", lambda device: None)
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: pytest.fail("nothing is to be timed"))
    assert faster_dtype(CausalLM, Transformer(TOY), {}) == ("float32", {})


@pytest.mark.parametrize(
    ("seconds", "rounds", "chosen"),
    [
        ({"float32": 0.4, "bfloat16": 0.8}, 2, "float32"),  # clearly behind
        ({"float32": 0.8, "bfloat16": 0.4}, 2, "bfloat16"),
        ({"float32": 0.002, "bfloat16": 0.004}, 6, "float32"),  # as clearly, but so short that one of them may be noise
        ({"float32": 0.1, "bfloat16": 30.0}, 1, "float32"),  # the first round has said enough, and cost enough
        ({"float32": 0.01, "bfloat16": 0.011}, 21, "float32"),
        ({"float32": 2.0, "bfloat16": 1.9}, 2, "bfloat16"),  # no time for more
    ],
)
def test_measuring_stops_when_one_precision_is_clearly_behind(seconds, rounds, chosen, monkeypatch):
    turns = []

    def fake(run, device):
        turns.append(("float32", "bfloat16")[len(turns) % 2])
        return seconds[turns[-1]]

    monkeypatch.setattr(measure, "narrow_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(measure, "seconds_of", fake)
    assert faster_dtype(CausalLM, Transformer(TOY), {}) == (chosen, seconds)
    assert len(turns) == 2 * rounds


def test_a_first_round_beside_others_does_not_count(monkeypatch):
    later = iter([0.4, 0.8] * 20)
    first = iter([0.3, 0.001])
    monkeypatch.setattr(measure, "narrow_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: next(first, None) or next(later))
    assert faster_dtype(CausalLM, Transformer(TOY), {}) == ("float32", {"float32": 0.4, "bfloat16": 0.8})


def test_measuring_leaves_model_and_random_state_alone(monkeypatch):
    monkeypatch.setattr(measure, "narrow_dtype", lambda device: "bfloat16")
    model = Transformer(TOY)
    before = [p.clone() for p in model.parameters()]
    batch = as_batch(torch.randint(300, (2, 32)), torch.randint(300, (2, 32)))
    state = torch.get_rng_state()
    dtype, times = faster_dtype(CausalLM, model, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert times[dtype] == min(times.values())
    assert set(times) == {"float32", "bfloat16"}
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    corpus = Corpus("toy", [prose(60)], [prose(5, 1), prose(4, 2)])
    return prepare(corpus, tmp_path_factory.mktemp("data"), vocab_size=300)


def test_bits_per_byte_is_the_sum_over_all_tokens_in_their_windows(dataset):
    model = Transformer(TOY).train()
    ids = torch.from_numpy(dataset.validation.tokens.astype("int64"))
    nats, context = 0.0, TOY.context_length
    model.eval()
    with torch.no_grad():
        for position in range(1, len(ids)):
            # Window k ends at 32 + 16 k, the last one at the end.
            end = context if position <= context else context + -(-(position - context) // 16) * 16
            start = min(end, len(ids) - 1) - context
            logits = model(ids[None, start : start + context])[0, position - start - 1]
            nats += F.cross_entropy(logits.double(), ids[position]).item()
    model.train()
    for batch_size in (1, 5):
        result = evaluate(model, dataset.validation, context, batch_size)
        assert result.tokens == len(ids) - 1
        assert result.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(
            nats / math.log(2) / (len(prose(5, 1)) + len(prose(4, 2))), rel=1e-5
        )
    assert model.training


def test_a_long_split_is_sampled_during_a_run_and_scored_whole_at_its_end(config, tmp_path):
    train(config(eval_interval=3, eval_windows=2), tmp_path / "run", quiet=True)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line]
    whole = open_dataset(tmp_path / "run" / "data").validation
    assert [(line["step"], line["validation_tokens"]) for line in lines] == [(3, 48), (6, 48), (6, len(whole) - 1)]


def test_evaluation_draws_no_random_numbers(dataset):
    model = Transformer(TOY)
    state = torch.get_rng_state()
    evaluate(model, dataset.validation, 32, 4)
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_learns_and_leaves_all_it_promises(whole_run, config, tmp_path, capsys):
    result = train(config(steps=40, eval_interval=20), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["tokens"] for line in steps] == [4 * 32 * n for n in range(1, 41)]
    assert set(steps[0]) == {
        "step", "tokens", "seconds", "loss", "lr", "muon_lr", "grad_norm", "tokens_per_second", "mfu", "skipped",
        "data_seconds", "forward_seconds", "backward_seconds", "update_seconds",
    }  # fmt: skip
    assert [line["step"] for line in evaluations] == [20, 40]
    assert result.validation_bits_per_byte == evaluations[-1]["validation_bits_per_byte"]
    assert steps[0]["loss"] == pytest.approx(math.log(300), abs=0.5)
    assert evaluations[1]["validation_bits_per_byte"] < evaluations[0]["validation_bits_per_byte"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "no prompt" in (tmp_path / "run" / "samples.txt").read_text()
    model = Transformer.from_pretrained(tmp_path / "run" / "model")
    assert model.config == replace(TOY, vocab_size=model.config.vocab_size)
    out = capsys.readouterr().out
    for expected in ("[training]", "MFU = ", "bits per byte", "xz -9", "tok/s", "ETA", "100%"):
        assert expected in out
    assert f"{result.xz_bits_per_byte:.4f}" in out


@pytest.mark.parametrize(("decoder", "counted"), [("transformer", "6 N + attention over 32 tokens"), ("gru", "6 N")])
def test_mfu_names_what_it_counts(config, tmp_path, capsys, decoder, counted):
    settings = config(steps=1)
    train(replace(settings, model=settings.model.replace(decoder=decoder)), tmp_path / "run")
    assert f"MFLOP/token ({counted}) x tokens/s" in capsys.readouterr().out


def test_same_settings_same_weights_and_another_seed_others(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), tmp_path / name, quiet=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_how_often_one_looks_changes_nothing(config, tmp_path, monkeypatch):
    train(config(eval_interval=0), tmp_path / "a", quiet=True)
    torch.manual_seed(99)
    monkeypatch.setattr(meters, "FLUSH_SECONDS", 0.0)
    train(config(eval_interval=1, checkpoint_interval=2), tmp_path / "b", quiet=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    losses = [[x["loss"] for x in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in x] for n in "ab"]
    assert losses[0] == losses[1]


def test_a_run_begins_with_short_windows_and_every_pass_has_as_many_tokens(config, tmp_path, monkeypatch):
    shapes, losses = [], CausalLM.losses

    def seen(model, batch):
        shapes.append(tuple(batch["tokens"].shape))
        return losses(model, batch)

    monkeypatch.setattr(CausalLM, "losses", staticmethod(seen))
    result = train(config(steps=4, micro_batch_size=2), tmp_path / "run", quiet=True)
    assert shapes == 4 * [(8, 8)] + 4 * [(2, 32)]
    lines = [line["tokens"] for line in read_metrics(result.folder / "metrics.jsonl") if "lr" in line]
    assert lines == [128, 256, 384, 512]


def test_a_time_budget_ends_the_run_with_evaluation_off_the_clock(config, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastllm.training.clock.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(seconds, function):
        def run(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(session, "batch_gradients", timed(1.0, batch_gradients))
    monkeypatch.setattr(CausalLM, "evaluate", timed(100.0, CausalLM.evaluate))
    monkeypatch.setattr(saving, "save_checkpoint", timed(100.0, saving.save_checkpoint))
    result = train(
        config(
            steps=None, max_seconds=8, warmup=0.25, eval_interval=3, checkpoint_interval=3, background_saving=False
        ),
        tmp_path / "run", quiet=True,
    )  # fmt: skip
    assert result.steps == 8
    assert result.seconds == pytest.approx(8)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["lr"] / 3e-3 for line in lines] == pytest.approx([0.01, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_the_clock_stands_still_in_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastllm.training.clock.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"), 7.0)
    now[0] += 2
    with clock.pause():
        now[0] += 50
    now[0] += 1
    assert clock.seconds == pytest.approx(10)
