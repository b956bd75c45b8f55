"""LSTM and GRU in the places of the Transformer: their cache, their precision, how they start."""

import pytest
import torch
from conftest import DEVICE

from fastllm.models import ModelConfig, build_model, rnn

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

SHAPE = dict(vocab_size=41, context_length=16, num_layers=2, num_heads=2, hidden_size=16)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_language_model_caches_its_state(kind):
    model = build_model(ModelConfig(**SHAPE, decoder=kind)).to(DEVICE).eval()
    tokens = torch.randint(41, (2, 11), device=DEVICE)
    cache = model.new_cache(2)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split((1, 4, 6), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="keeps no gradient"):
        model(tokens, model.new_cache(2))
    with pytest.raises(ValueError, match="one direction"):
        model(tokens, prefix=torch.tensor([1, 2], device=DEVICE))


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_sequences_are_read_as_a_cpu_reads_them(kind):
    block = rnn.RecurrentBlock(ModelConfig(**SHAPE, encoder=kind), kind, bidirectional=True, cross=False)
    x, lengths = torch.randn(5, 7, 16, requires_grad=True), torch.tensor([2, 7, 1, 7, 4])
    there = torch.arange(7) < lengths[:, None]
    results = []
    for sequences in (lengths, rnn.LongestFirst.of(lengths, x.device)):
        states = block._states(x, sequences, None, 0) * there[..., None]
        results.append((states, *torch.autograd.grad(states.cos().sum(), x)))
    for packed, directions in zip(*results, strict=True):
        torch.testing.assert_close(packed, directions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrence_runs_under_autocast(kind, dtype):
    model = build_model(ModelConfig(**SHAPE, encoder=kind, decoder=kind)).to(DEVICE)
    source, lengths = torch.randint(41, (3, 11), device=DEVICE), torch.tensor([11, 4, 1], device=DEVICE)
    target = torch.randint(41, (3, 6), device=DEVICE)

    def logits_and_gradient():
        model.zero_grad()
        logits = model(target, model.encode(source, lengths)).float()
        logits.square().mean().backward()
        return logits.detach(), model.encoder.blocks[0].recurrence.weight_ih_l0.grad

    expected = logits_and_gradient()
    with torch.autocast(DEVICE.type if isinstance(DEVICE, torch.device) else DEVICE, dtype):
        found = logits_and_gradient()
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()  # measured: at most 0.02, in bfloat16


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("has_products", [True, False])
def test_a_recurrence_stays_in_float32_where_the_cpu_has_no_products_of_bfloat16(monkeypatch, has_products):
    """oneDNN has no LSTM in bfloat16 there, and PyTorch asks it for one."""
    monkeypatch.setattr(rnn.cpu, "multiplies", lambda dtype: has_products)
    with torch.autocast("cpu", torch.bfloat16):
        assert rnn._autocast_fails(DEVICE) != has_products
        assert rnn._autocast_fails(torch.device("cuda")) is False
    with torch.autocast("cpu", torch.float16):
        assert rnn._autocast_fails(DEVICE)
    assert not rnn._autocast_fails(DEVICE)


@pytest.mark.runs_on("interpreter")
def test_the_forget_gates_of_an_lstm_start_open():
    model = build_model(ModelConfig(**SHAPE, encoder="lstm", decoder="lstm"))
    biases = {name: bias for name, bias in model.named_parameters() if ".bias_hh" in name}
    assert len(biases) == 2 * 2 + 2  # two directions in each layer of the encoder
    for name, bias in biases.items():
        into, forget, cell, out = bias.chunk(4)
        assert (forget == 1.0).all(), name
        assert not (torch.cat([into, cell, out]) == 1.0).any(), name
