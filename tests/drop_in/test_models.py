"""accelerate() on tiny models of many transformers architectures: what they compute and how they train stays."""

import copy
import functools
import operator
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, build, there
from contract import Roundings, assert_as_true
from thorough import IS_THOROUGH

import fastllm

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
STEPS = 30


def loss_and_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def wide(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def curve(model, inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# One of each kind: every other is a close relative, and each takes seconds. FASTLLM_TESTS=thorough runs them all.
KINDS = (
    "llama", "mistral", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "cohere", "granite", "gpt2", "gpt_neox", "bloom",
    "mixtral", "gpt_oss", "bert", "modernbert", "t5", "whisper", "wav2vec2", "vit", "convnextv2",
)  # fmt: skip
NAMES = list(ARCHITECTURES) if IS_THOROUGH else KINDS


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_training_and_revert(name):
    if not there(name):
        pytest.skip(f"this transformers has no {ARCHITECTURES[name][0]}")
    model, inputs = build(name)
    other = type(model)(model.config).train()
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    classes, own_classes = ([type(m) for m in x.modules()] for x in (other, model))
    attention = other.config._attn_implementation
    with torch.no_grad():
        before = other(**inputs).loss
    oracle = copy.deepcopy(other).double()
    oracle.config._experts_implementation = "eager"  # torch's grouped product has no fp64
    truth = loss_and_gradients(oracle, wide(inputs))
    roundings = Roundings(lambda: loss_and_gradients(oracle, wide(inputs)))
    eager = loss_and_gradients(other, inputs)
    keys = list(model.state_dict())

    report = fastllm.accelerate(model)
    assert report.swapped
    assert list(model.state_dict()) == keys
    got = loss_and_gradients(model, inputs)
    for key in eager:
        at = functools.partial(roundings.error, operator.itemgetter(key))
        assert_as_true(got[key], truth[key], eager[key], torch.float32, f"{name}: {key}", roundings=at)
    # Another instance, of the very same configuration object, is what it was.
    assert [type(m) for m in other.modules()] == classes
    assert other.config._attn_implementation == attention
    with torch.no_grad():
        assert torch.equal(other(**inputs).loss, before)
    fastllm.revert(model)
    assert [type(m) for m in model.modules()] == own_classes
    assert model.config is other.config
    again = loss_and_gradients(model, inputs)
    for key in eager:
        assert (again[key] is None and eager[key] is None) or torch.equal(again[key], eager[key]), key

    fastllm.accelerate(model)
    moved = copy.deepcopy(other)
    losses, expected = curve(model, inputs), curve(other, inputs)
    if not torch.allclose(losses, expected, rtol=2e-3, atol=2e-3):
        # Steps that amplify roundings (gemma4's do, 0.04 from these) are held to what half an eps of the weights makes.
        for parameter in moved.parameters():
            parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps / 2 * torch.randn_like(parameter))
        assert (losses - expected).abs().max() <= 2 * (curve(moved, inputs) - expected).abs().max()
    assert losses[-1] < losses[0]


def test_every_kind_of_architecture_is_there():
    assert len(ARCHITECTURES) >= 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = {name: fastllm.accelerate(build(name)[0], dry_run=True).left for name in ("opt", "bloom")}
    assert any("forward of its own" in entry.why for entry in left["opt"])
    assert any("AttentionInterface" in entry.why for entry in left["bloom"])
