"""What accelerate() needs of transformers beyond its public API is looked up before anything is changed."""

import copy
import sys

import pytest
import torch
from architectures import build

import fastllm

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def internals():
    """Every function of the modules of transformers that attention passes through."""
    from transformers import masking_utils
    from transformers.integrations import sdpa_attention

    return [
        (module, name)
        for module in (sdpa_attention, masking_utils)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not isinstance(value, type)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5"])
def test_no_function_of_transformers_is_imported_at_a_forward(name, monkeypatch):
    """A name that another version may lack: gone from its module once the model's own code has got it."""
    model, inputs = build(name)
    expected = copy.deepcopy(model)(**inputs).loss
    report = fastllm.accelerate(model, only="attention")
    if any("does not call attention through AttentionInterface" in entry.why for entry in report.left):
        assert name == "t5"
        pytest.skip("T5 of transformers 5.0 has an attention of its own")
    assert any(entry.by == "attention" for entry in report.swapped)
    looked_up = []

    class Watched(type(sys)):
        def __getattribute__(self, name):
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__", "").startswith("fastllm."):
                looked_up.append(name)
            return super().__getattribute__(name)

    for module in {module for module, _ in internals()}:
        monkeypatch.setattr(module, "__class__", Watched)
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert looked_up == []


def without(monkeypatch, what: str) -> None:
    """Takes a part of transformers' attention interface away."""
    interface = getattr(transformers, what.split(".")[0])
    if what.endswith(".sdpa"):
        monkeypatch.delitem(interface._global_mapping, "sdpa")
    else:
        monkeypatch.setattr(interface, "register", None)


@pytest.mark.parametrize(
    "what",
    ["AttentionInterface.register", "AttentionMaskInterface.register", "AttentionInterface.sdpa",
     "AttentionMaskInterface.sdpa"],
)  # fmt: skip
def test_what_transformers_lacks_leaves_attention_alone_with_a_reason(what, monkeypatch):
    model, inputs = build("llama")
    expected = copy.deepcopy(model)(**inputs).loss
    config, attention = model.config, model.config._attn_implementation
    with monkeypatch.context() as patch:
        without(patch, what)
        report = fastllm.accelerate(model)
    (entry,) = {entry.why for entry in report.left}
    assert "this transformers" in entry
    assert what.split(".")[0] in entry
    assert model.config is config
    assert config._attn_implementation == attention
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_a_bias_of_positions_is_added_as_transformers_adds_it(causal, mask):
    from fastllm.drop_in.attention import attention_forward

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8) for n in (5, 5, 5))
    bias = torch.randn(1, 2, 5, 5)
    hidden = torch.rand(2, 1, 5, 5) < 0.3
    hidden[0, 0, 2] = True  # a query that sees nothing
    given = {"none": None, "boolean": ~hidden, "additive": torch.zeros(2, 1, 5, 5).masked_fill(hidden, -3.0)}[mask]
    out, weights = attention_forward(
        torch.nn.Module(), query, key, value, given, scaling=0.3, is_causal=causal, position_bias=bias
    )
    assert weights is None
    scores = (query @ key.transpose(-1, -2)) * 0.3 + bias
    if mask == "additive":
        scores = scores + given
    elif mask == "boolean":
        scores = torch.where(given, scores, torch.finfo(torch.float32).min)
    elif causal:
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2))


def test_a_bias_of_positions_ends_with_the_keys_of_a_cache_with_room():
    """Without a mask the first query sees the first key, and no query the keys that are not there yet."""
    from fastllm.drop_in.attention import attention_forward

    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 2, 8, 8)
    bias = torch.randn(1, 2, 5, 8)
    filled = dict(query=query, key=key[:, :, :5], value=value[:, :, :5], position_bias=bias[..., :5])
    outs = [
        attention_forward(torch.nn.Module(), **call, attention_mask=None, scaling=0.3, is_causal=True)[0]
        for call in (dict(query=query, key=key, value=value, position_bias=bias), filled)
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(("heads", "groups", "masked"), [(4, 2, True), (2, 1, True), (4, 2, False), (2, 2, True)])
def test_heads_that_do_not_fit_their_groups_raise_as_in_transformers(heads, groups, masked):
    """DeepSeek's attention makes keys for all heads; a configuration with fewer of them repeats those."""
    from fastllm.drop_in.attention import attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = groups
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, heads, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril() if masked else None

    def outcome(function):
        try:
            return function(module, query, key, key, mask)[0]
        except RuntimeError as error:
            return str(error)

    got, expected = outcome(attention_forward), outcome(transformers.AttentionInterface()["sdpa"])
    assert type(got) is type(expected)
    assert got == expected if isinstance(got, str) else torch.allclose(got, expected, atol=1e-6)
