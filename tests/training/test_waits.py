"""What makes the host wait for its device: nothing in a step, one read a scoring, one a token in generation."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.utils import _to_kwargs

from fastllm.bench import train, train_steps
from fastllm.generate import beam_search, generate, greedy
from fastllm.models import Encoder, ModelConfig, Transformer, TransformerConfig, build_model
from fastllm.tasks.features import Features
from fastllm.training import step as training_step
from fastllm.training.config import TrainingConfig
from fastllm.training.evaluate import evaluate
from fastllm.training.objective import to_device
from fastllm.training.objectives import Answer, Classify
from fastllm.training.parallel.distributed import Group, WeightedLoss

SHAPES = {
    "gpt2": TransformerConfig(
        vocab_size=50, context_length=24, num_layers=2, num_heads=2, hidden_size=32, activation="gelu_tanh"
    ),
    "llama": TransformerConfig(
        vocab_size=50, context_length=24, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32,
        positions="rotary", norm="rms", activation="swiglu", tie_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.runs_on("anywhere")
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_step_reads_nothing_from_its_device(config, optimizer, monkeypatch):
    """The device "meta" keeps no values, so a step that asked for one would fail."""
    monkeypatch.setattr(training_step, "autocast", lambda device, dtype: contextlib.nullcontext())
    training = TrainingConfig(batch_size=4, micro_batch_size=2, optimizer=optimizer)
    setting = train_steps.Setting(Transformer(config), training, "float32", torch.device("meta"))
    step = train_steps.ours(setting)
    for batch in train.batches(config, 4, 2):
        loss = step(batch)
        assert loss.is_meta
        assert loss.shape == ()


SMALL = dict(vocab_size=50, context_length=24, num_layers=1, num_heads=2, hidden_size=32)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("encoder", ["transformer", "packed", "lstm", "gru", "conv"])
def test_sequences_of_any_length_are_read_without_a_wait(encoder):
    """As a batch of an objective comes to its device, where "meta" stands for a GPU."""
    place = torch.zeros(3, dtype=torch.long)
    batch = {
        "tokens": torch.ones(3, 9, dtype=torch.long), "segments": torch.zeros(3, 9, dtype=torch.long),
        "lengths": torch.tensor([4, 9, 1]), "start": place, "end": place,
    }  # fmt: skip
    batch = to_device(batch, torch.device("meta"))
    kind = "transformer" if encoder == "packed" else encoder
    with torch.device("meta"):
        reader = Encoder(ModelConfig(**SMALL, encoder=kind, decoder="none", heads=("span",)))
        translator = build_model(ModelConfig(**SMALL, encoder=kind))
    for model in (reader, translator):
        model.encoder.packed = encoder == "packed"
    loss = sum(Answer.losses(reader, batch).values())
    loss = loss + translator.loss(batch["tokens"], batch["lengths"], batch["tokens"], batch["tokens"])
    loss.backward()
    assert loss.is_meta


@pytest.mark.runs_on("anywhere")
def test_ddp_and_fsdp_leave_a_batch_where_it_is():
    group, module = object.__new__(Group), WeightedLoss(nn.Identity())
    # As both do with what their module is called with.
    group._module = lambda *args: module(*_to_kwargs(args, {}, torch.device("meta"), False)[0][0])

    def losses(model, batch):
        return {"loss": batch["lengths"].sum()}

    batch = to_device({"lengths": torch.tensor([4, 9, 1])}, torch.device("meta"))
    assert group.shares(losses, None, batch, {"loss": 0.5}, batch)["loss"].item() == 7


class _Text:
    tokens, bytes = torch.arange(60).numpy() % 50, 60

    def __len__(self):
        return len(self.tokens)


@pytest.mark.runs_on("anywhere")
def test_a_scoring_is_one_read(monkeypatch):
    reads = _reads(monkeypatch)
    found = evaluate(Transformer(SHAPES["gpt2"]), _Text(), 24, 2)
    assert found.tokens == 59
    assert [name for name in reads if name in ("item", "tolist")] == ["tolist"]


@pytest.mark.runs_on("anywhere")
def test_a_scoring_of_classes_does_not_wait_at_a_batch(monkeypatch):
    objective = object.__new__(Classify)
    rows = [{"tokens": [1] * length, "labels": length % 3} for length in range(2, 14)]
    objective.validation = Features(rows, {"tokens": 0}, {"lengths": "tokens"})
    objective.dataset = SimpleNamespace(labels=("a", "b", "c"))
    model = Encoder(ModelConfig(**SMALL, encoder="conv", decoder="none", heads=("classify",), labels=("a", "b", "c")))
    reads = _reads(monkeypatch)
    assert objective.evaluate(model, 2, "float32", 0).tokens == 12
    # The losses, the classes found and the labels, of all batches together.
    assert [name for name in reads if name in ("item", "tolist")] == ["tolist"] * 3


@pytest.mark.runs_on("gpu")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_a_gpu_does_not_wait(optimizer):
    config = SHAPES["llama"].replace(hidden_size=128)
    training = TrainingConfig(batch_size=4, micro_batch_size=2, optimizer=optimizer)
    device = torch.device("cuda")
    step = train_steps.ours(train_steps.Setting(Transformer(config).to(device), training, "bfloat16", device))
    first, *others = train.batches(config, 4, 3)
    step(first)  # compiles, and pins its first memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Moved:
    """A tensor in host memory as far as :func:`to_device` looks."""

    is_cpu = True

    def __init__(self):
        self.pinned = False

    def pin_memory(self):
        found = _Moved()
        found.pinned = True
        return found

    def to(self, device, non_blocking=False):
        return device, self.pinned, non_blocking


@pytest.mark.runs_on("anywhere")
def test_a_batch_goes_to_a_gpu_from_pinned_memory():
    assert to_device({"tokens": _Moved()}, torch.device("cuda")) == {"tokens": (torch.device("cuda"), True, True)}
    assert to_device({"tokens": _Moved()}, torch.device("cpu")) == {"tokens": (torch.device("cpu"), False, False)}
    # An encoder reads these, and copies them from there.
    assert to_device({"lengths": _Moved()}, torch.device("cuda"))["lengths"].pinned


class _Cache:
    length = 0

    def select(self, index, same_memory=False):
        pass


class _Model(nn.Module):
    """The same scores for any tokens."""

    config = SHAPES["gpt2"]

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 50)

    def new_cache(self, batch_size=1):
        return _Cache()

    def last_logits(self, tokens, cache):
        cache.length += tokens.shape[1]
        return torch.linspace(0.0, 3.0, 50).repeat(len(tokens), 1)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_token_is_one_read(how, monkeypatch):
    reads = _reads(monkeypatch)
    tokens = list(generate(_Model(), [1, 2], max_new_tokens=22, seed=0, **how))
    assert len(tokens) == 22
    assert reads == ["tolist"] * 22


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(("search", "at_the_end"), [(greedy, 1), (beam_search, 3)])
def test_a_step_of_a_search_is_one_read(search, at_the_end, monkeypatch):
    reads = _reads(monkeypatch)
    search(_Model(), torch.ones(2, 1, dtype=torch.long), max_new_tokens=12, stop_token=0)
    assert reads == ["tolist"] * (12 + at_the_end)


def _reads(monkeypatch):
    """What reads a tensor's values from here on, as it is called."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, real=real, name=name: (reads.append(name), real(self, *args))[1]
        )
    return reads


@pytest.mark.runs_on("anywhere")
def test_tokens_are_those_that_multinomial_draws():
    found = list(generate(_Model(), [1], max_new_tokens=200, seed=7))
    generator = torch.Generator().manual_seed(7)
    odds = torch.linspace(0.0, 3.0, 50).softmax(-1)
    assert found == [int(torch.multinomial(odds, 1, generator=generator)) for _ in found]
