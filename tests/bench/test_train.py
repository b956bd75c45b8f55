"""bench/train.py: the plain model is the same function, and a provider that differs or fails gets no time."""

import io
import itertools
import json
import math
import time
import types

import pytest
import torch
from alarm import ring
from rich.console import Console
from torch import nn

from fastllm.bench import timing, train, train_steps
from fastllm.bench.plain import PlainTransformer
from fastllm.bench.timing import FEWEST, Quartiles, interleaved, ratios
from fastllm.models import Transformer, TransformerConfig
from fastllm.training.config import TrainingConfig

SMALL = TransformerConfig(
    vocab_size=50, context_length=24, num_layers=2, num_heads=2, hidden_size=32, activation="gelu", bias=False
)
SHAPES = {
    "gpt2": SMALL.replace(activation="gelu_tanh", bias=True),
    "small": SMALL,
    "llama": SMALL.replace(
        num_heads=4, num_kv_heads=2, positions="rotary", norm="rms", activation="swiglu", tie_embeddings=False
    ),
    "tiny": SMALL.replace(
        positions="rotary", norm="rms", embedding_norm=True, qk_norm=True, activation="relu2", zero_init=True
    ),
}


def _setting(config=SMALL, dtype="float32", **more):
    torch.manual_seed(0)
    training = TrainingConfig(batch_size=3, optimizer="adamw", lr=3e-4)
    return train_steps.Setting(Transformer(config), training, dtype, torch.device("cpu"), **more)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_plain_model_is_the_same_function(config):
    model = _setting(config).model
    plain = PlainTransformer(model)
    tokens, targets = train.batches(config, 3, 1)[0].values()
    targets[0, :5] = -100
    loss, plain_loss = model.loss(tokens, targets), plain.loss(tokens, targets)
    torch.testing.assert_close(plain_loss, loss, rtol=1e-6, atol=1e-6)
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, model.parameters())
    plain_grads = torch.autograd.grad(plain_loss, [plain.weights[name] for name in names])
    for name, grad, plain_grad in zip(names, grads, plain_grads, strict=True):
        torch.testing.assert_close(plain_grad, grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_providers_agree_and_are_timed(dtype):
    rows = train.compare(_setting(dtype=dtype), ["PyTorch eager"], steps=1, rounds=3, tell=lambda line: None)
    assert [row.provider for row in rows] == [train.OURS, "PyTorch eager"]
    for row in rows:
        assert row.problem is None
        assert len(row.samples) == 3
        assert len(row.losses) == train.CHECKED
        # A fresh model gives each of the 50 tokens about the same probability.
        assert row.losses[0] == pytest.approx(math.log(50), rel=0.05)
        assert row.tokens_per_second.low <= row.tokens_per_second.median <= row.tokens_per_second.high
    assert rows[0].speedup == Quartiles(1.0, 1.0, 1.0)


def test_a_wrong_or_failing_provider_gets_no_time_and_stops_nothing(monkeypatch):
    def wrong(setting):
        step = train_steps.eager(setting)
        return lambda batch: step(batch) * 1.001

    def failing(setting):
        raise ValueError("no such model\nat all")

    monkeypatch.setitem(train.PROVIDERS, "wrong", wrong)
    monkeypatch.setitem(train.PROVIDERS, "failing", failing)
    names = ["wrong", "failing", "PyTorch eager"]
    rows = train.compare(_setting(), names, steps=1, rounds=1, tell=lambda line: None)
    assert [row.provider for row in rows] == [train.OURS, *names]
    assert "differ" in rows[1].problem
    assert rows[2].problem == "ValueError: no such model"
    assert [len(row.samples) for row in rows] == [1, 0, 0, 1]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(train.table(rows, "title"))
    lines = [line for line in console.export_text().splitlines() if "wrong" in line or "failing" in line]
    assert len(lines) == 2
    assert all("not timed" in line for line in lines)


def test_a_provider_that_takes_the_budget_is_left_out_and_the_others_are_timed(monkeypatch):
    """As torch.compile may on a GPU that is lent for minutes."""

    monkeypatch.setitem(train.PROVIDERS, "slow", lambda setting: ring())
    now = itertools.count(step=10)
    clock = types.SimpleNamespace(monotonic=lambda: next(now), perf_counter=time.perf_counter)
    for module in (train, timing):
        monkeypatch.setattr(module, "time", clock)
    names = ["PyTorch eager", "slow"]
    rows = train.compare(_setting(), names, steps=1, rounds=10**9, budget=1000, tell=lambda line: None)
    assert [row.provider for row in rows] == [train.OURS, *names]
    assert rows[2].problem == "stopped after 735 s"  # three quarters of what the third look at the clock leaves
    assert min(len(row.samples) for row in rows[:2]) >= FEWEST


class NanoGPT(nn.Module):
    """A module with the names of nanoGPT's parameters."""

    def __init__(self, vocab_size, context, layers, width, bias):
        super().__init__()

        def norm():
            return nn.LayerNorm(width, bias=bias)

        def linear(inputs, outputs):
            return nn.Linear(inputs * width, outputs * width, bias=bias)

        def block():
            attention = nn.ModuleDict(dict(c_attn=linear(1, 3), c_proj=linear(1, 1)))
            mlp = nn.ModuleDict(dict(c_fc=linear(1, 4), c_proj=linear(4, 1)))
            return nn.ModuleDict(dict(ln_1=norm(), attn=attention, ln_2=norm(), mlp=mlp))

        tables = dict(wte=nn.Embedding(vocab_size, width), wpe=nn.Embedding(context, width))
        blocks = nn.ModuleList(block() for _ in range(layers))
        self.transformer = nn.ModuleDict(dict(**tables, h=blocks, ln_f=norm()))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_takes_our_weights(bias):
    renamed = train_steps.nanogpt_weights(_setting(SMALL.replace(bias=bias)).model.state_dict())
    NanoGPT(50, 24, 2, 32, bias).load_state_dict(renamed, strict=True)


def test_nanogpt_refuses_a_model_that_it_has_not(tmp_path):
    with pytest.raises(ValueError, match="nanoGPT has only positions='learned'"):
        train_steps.nanogpt(_setting(SHAPES["llama"], nanogpt=tmp_path))


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_takes_our_weights_and_has_our_losses(bias):
    pytest.importorskip("transformers", reason="transformers is not installed")
    setting = _setting(SMALL.replace(bias=bias))
    rows = train.compare(setting, ["transformers"], steps=1, rounds=1, tell=lambda line: None)
    assert [row.problem for row in rows] == [None, None]
    assert rows[1].losses == pytest.approx(rows[0].losses, rel=1e-5)
    with pytest.raises(ValueError, match="transformers' GPT-2 has only positions='learned'"):
        train_steps.hugging_face(_setting(SHAPES["llama"]))


def test_the_command_writes_every_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "small", SMALL)
    file = tmp_path / "train.json"
    train.main(["--batch-size", "2", "--steps", "2", "--rounds", "2", "--dtype", "float32", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["environment"]["packages"]["torch"]
    assert [len(row["samples"]) for row in found["rows"]] == [2, 2]
    assert "PyTorch eager" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--rounds", "0"], ["--nanogpt", "/nowhere"], ["--dtype", "float16"]])
def test_bad_options_are_refused_before_any_work(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_interleaving_turns_the_order_around():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = interleaved(runs, rounds=2, device=torch.device("cpu"), warmup=1)
    assert "".join(order) == "baabba"
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_no_time_left_means_the_fewest_rounds():
    samples = interleaved({"a": lambda: None}, rounds=50, device=torch.device("cpu"), within=0.0)
    assert len(samples["a"]) == FEWEST


def test_ratios_pair_the_rounds():
    assert ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}, "a", "b") == Quartiles(2.0, 2.0, 2.0)
