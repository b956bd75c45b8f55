"""Outputs and handles of an accelerated transformers model are those of the model: weights, hooks, configurations."""

import copy
import pickle
import threading

import pytest
import torch
from architectures import attentions, build, pair, same_gradients

import fastllm
from fastllm.drop_in import attention, attention_call
from fastllm.drop_in.attention import attending_within

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
# Of models whose own attention is eager, since sdpa cannot do what they need: transformers 5.0 gives Gemma 2 sdpa.
NEED_EAGER = ["gemma2", "gpt_oss"] if not transformers.Gemma2PreTrainedModel._supports_sdpa else ["gpt_oss"]


@pytest.fixture
def ours(monkeypatch):
    """The calls that our attention serves."""
    calls = []
    for name in ("attention", "scaled_dot_product_attention"):
        function = getattr(attention_call, name)
        monkeypatch.setattr(attention_call, name, lambda *a, _f=function, **k: calls.append(1) or _f(*a, **k))
    return calls


def assert_same_weights(got, want):
    names = [name for name in want if "attentions" in name]
    assert names == [name for name in got if "attentions" in name]
    for name in names:
        assert len(got[name]) == len(want[name]), name
        for a, b in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "by"),
    [(name, "argument") for name in (*NEED_EAGER, "llama", "t5", "bert", "whisper")]
    + [(name, "configuration") for name in (*NEED_EAGER, "llama", "bert")],  # T5's stacks have copies of their own
)
def test_weights_that_are_asked_for_are_what_they_were(name, by):
    model, other, inputs = pair(name, only="attention")
    asked = {}
    if by == "argument":
        asked["output_attentions"] = True
    else:
        for each in (model, other):
            each.config._output_attentions = True  # its own setter refuses with sdpa
    got, want = model(**inputs, **asked), other(**inputs, **asked)
    assert_same_weights(got, want)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("name", NEED_EAGER)
def test_only_the_call_that_asks_takes_the_models_own_path(name, ours):
    model, other, inputs = pair(name, only="attention")
    layers = model.config.num_hidden_layers
    for _ in range(2):
        model(**inputs)
        assert len(ours) == layers
        assert len(model(**inputs, output_attentions=True).attentions) == layers
        assert len(ours) == layers
        ours.clear()
    hook = next(attending_within(model)).register_forward_hook(lambda *_: None)
    model(**inputs)
    assert not ours
    hook.remove()
    model.model(inputs["input_ids"])
    assert len(ours) == layers
    got = model.model(inputs["input_ids"], output_attentions=True)
    assert_same_weights(got, other.model(inputs["input_ids"], output_attentions=True))
    assert len(ours) == layers


@pytest.mark.parametrize("name", NEED_EAGER)
def test_a_hook_on_attention_gets_the_weights(name):
    model, other, inputs = pair(name, only="attention")
    seen = []
    for each in (model, other):
        weights = []
        seen.append(weights)
        for part in attending_within(each):
            part.register_forward_hook(lambda _, __, output, weights=weights: weights.append(output[1]))
        each(**inputs)
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NEED_EAGER)
def test_a_recomputed_forward_takes_the_path_of_the_first(name):
    model, other, inputs = pair(name, only="attention")
    for each in (model, other):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for asked in ({"output_attentions": True}, {}):
        for each in (model, other):
            each.zero_grad()
            each(**inputs, **asked, use_cache=False).loss.backward()
        same_gradients(model, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NEED_EAGER)
def test_two_threads_one_of_which_asks(name):
    model, other, inputs = pair(name, only="attention")
    want = other(**inputs, output_attentions=True)
    wrong = []

    def run(asked):
        for _ in range(5):
            got = model(**inputs, output_attentions=asked)
            try:
                torch.testing.assert_close(got.loss, want.loss)
                if asked:
                    assert_same_weights(got, want)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(asked,)) for asked in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_report_says_which_calls_are_the_models_own():
    why = {entry.path: entry.why for entry in fastllm.accelerate(build(NEED_EAGER[0])[0]).swapped}[""]
    for part in ("attention weights", "head mask", "hook"):
        assert part in why


@pytest.mark.parametrize("name", [*NEED_EAGER, "llama", "clip"])
@pytest.mark.parametrize("wish", ["eager", "sdpa"])
def test_an_attention_that_is_chosen_afterwards_is_taken(name, wish, ours):
    if wish == "sdpa" and name in NEED_EAGER:
        pytest.skip("its code has no sdpa")
    model, other, inputs = pair(name, only="attention")
    if wish == "sdpa":
        for each in (model, other):
            each.set_attn_implementation("eager")
    for each in (model, other):
        each.set_attn_implementation(wish)
        assert each.config._attn_implementation == wish
    got, want = model(**inputs), other(**inputs)
    if wish == "eager" and name not in NEED_EAGER:
        assert not ours
        if name != "clip":  # whose outputs hold its parts' outputs
            assert_same_weights(model(**inputs, output_attentions=True), other(**inputs, output_attentions=True))
    torch.testing.assert_close(got.loss, want.loss)


def test_the_users_own_configuration_still_reaches_the_model():
    config = build("llama")[0].config
    model = transformers.LlamaForCausalLM(config)
    fastllm.accelerate(model)
    ids = torch.arange(6)[None]
    assert model.config is config
    config.use_cache = False
    assert model(ids).past_key_values is None
    config.output_hidden_states = True
    assert len(model(ids).hidden_states) == config.num_hidden_layers + 1
    for part in attending_within(model):
        assert part.config.use_cache is False
    config._attn_implementation = "eager"
    assert attentions(model) == {"eager"}
    assert model(ids, output_attentions=True).attentions


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_submodel_accelerated_by_itself_keeps_its_parents_configuration(name):
    model, inputs = build(name)
    other = copy.deepcopy(model)
    config = model.config
    fastllm.accelerate(model.model)
    assert model.config is config
    config.use_cache = False
    model.config.output_hidden_states = True
    outputs = model.eval()(inputs["input_ids"])
    assert outputs.past_key_values is None
    assert outputs.hidden_states is not None
    model.model.config.use_cache = True
    assert config.use_cache is True
    assert model.model.config == config
    torch.testing.assert_close(outputs.logits, other.eval()(inputs["input_ids"]).logits, rtol=1e-4, atol=1e-5)
    fastllm.accelerate(model)
    torch.testing.assert_close(model(**inputs).loss, other(**inputs).loss)
    fastllm.revert(model)
    assert model.model.config is config


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_another_model_of_an_accelerated_models_configuration(name):
    model, _ = build(name)
    fastllm.accelerate(model)
    for config in (model.config, model.model.config, copy.deepcopy(model.config)):
        fresh = transformers.AutoModelForCausalLM.from_config(config)
        assert "fastllm" not in attentions(fresh)
        assert "fastllm" not in config.to_json_string()
    copied = pickle.loads(pickle.dumps(model))
    assert copied.config is not model.config
    copied.config.use_cache = not model.config.use_cache
    assert {part.config.use_cache for part in attending_within(copied)} == {copied.config.use_cache}
    assert {part.config.use_cache for part in attending_within(model)} == {model.config.use_cache}


def test_generating_with_weights_from_a_static_cache():
    """generate() makes masks outside the forward, for the attention that the configuration names there."""
    model, other, inputs = pair(NEED_EAGER[0], only="attention")
    model.eval()
    other.eval()
    options = dict(
        max_new_tokens=3, do_sample=False, cache_implementation="static", output_attentions=True, pad_token_id=0,
        return_dict_in_generate=True, disable_compile=True,
    )  # fmt: skip
    got, want = (each.generate(inputs["input_ids"][:, :5], **options) for each in (model, other))
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.attentions, want.attentions, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("changes", [{}, {"attn_logit_softcapping": None}], ids=["capped", "not_capped"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama"])
def test_rows_of_left_padding_are_what_they_were(name, changes):
    """Eager attention gives them the mean of all values, and the first token's loss is made of the last of them."""
    model, inputs = build(name, **(changes if name == "gemma2" else {}))
    other = copy.deepcopy(model)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    fastllm.accelerate(model, only="attention")
    got, want = model(**inputs), other(**inputs)
    torch.testing.assert_close(got.logits + 0, want.logits, rtol=1e-4, atol=1e-5)
    got.loss.backward()
    want.loss.backward()
    same_gradients(model, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("taken", [False, True])
def test_what_sdpa_passes_over_is_passed_over(taken, monkeypatch):
    """The "sdpa" of transformers 5.0 drops Gemma 2's soft cap, and its models are trained without."""

    def sdpa(module, query, key, value, attention_mask, softcap=None, **kwargs): ...

    if taken:
        monkeypatch.setattr(attention, "transformers_sdpa", lambda: sdpa)
    model, other, _ = pair("llama", only="attention")
    part = next(attending_within(model))
    query, key, value = (10 * torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    capped, plain = (
        attention_call.attention_forward(part, query, key, value, None, softcap=cap)[0] for cap in (1.0, None)
    )
    assert torch.equal(capped, plain) is not taken
    other.set_attn_implementation("sdpa")
    torch.testing.assert_close(plain, transformers.AttentionInterface()["sdpa"](part, query, key, value, None)[0])


def _vmapped(model, inputs):
    return torch.vmap(lambda s: _scaled(model, inputs, s))(torch.tensor([1.0, 0.5]))


def _differentiated(model, inputs):
    return torch.func.jvp(lambda s: _scaled(model, inputs, s), (torch.tensor(1.0),), (torch.tensor(1.0),))[1]


def _on_meta(model, inputs):
    logits = model.to("meta")(**{name: value.to("meta") for name, value in inputs.items()}).logits
    return torch.zeros(logits.shape)


def _scaled(model, inputs, s):
    weights = {name: p * s for name, p in model.named_parameters() if "q_proj.weight" in name}
    return torch.func.functional_call(model, weights, (), {**inputs, "use_cache": False}).logits


# gpt-oss's experts have no jvp and nothing on meta.
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, _vmapped) for name in NEED_EAGER]
    + [(name, how) for name in NEED_EAGER if name != "gpt_oss" for how in (_differentiated, _on_meta)],
)
def test_tensors_that_ours_does_not_take_take_the_models_own_attention(name, how):
    model, other, inputs = pair(name, only="attention")
    del inputs["labels"]
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with torch.no_grad():
        torch.testing.assert_close(how(model, inputs), how(other, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", *NEED_EAGER])
def test_a_mask_of_another_shape_raises_what_it_raised(name):
    model, other, inputs = pair(name, only="attention")
    inputs["attention_mask"] = torch.ones(2, 1, 7, 5, dtype=torch.bool)
    for each in (model, other):
        with pytest.raises(RuntimeError):
            each(**inputs)


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV4Config"), reason="transformers without DeepSeek V4")
def test_code_that_changes_masks_as_numbers_gets_numbers(ours):
    model, inputs = build(
        "deepseek_v4", layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], index_topk=1,
        compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 4}, sliding_window=4,
    )  # fmt: skip
    other = copy.deepcopy(model)
    fastllm.accelerate(model, only="attention")
    model = pickle.loads(pickle.dumps(model))
    for each in (model, other):
        each(**inputs).loss.backward()
    assert len(ours) == 2
    same_gradients(model, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_that_is_registered_as_sdpa_is_called(when, ours, monkeypatch):
    model, inputs = build("llama")
    interface, called = transformers.AttentionInterface(), []
    theirs = interface["sdpa"]
    expected = model(**inputs).loss

    def registered():
        monkeypatch.setitem(
            transformers.AttentionInterface._global_mapping, "sdpa", lambda *a, **k: called.append(1) or theirs(*a, **k)
        )

    if when == "after":
        fastllm.accelerate(model, only="attention")
        model(**inputs)
        assert ours
        assert not called
        ours.clear()
        registered()
    else:
        registered()
        assert not fastllm.accelerate(model, only="attention").swapped
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert len(called) == model.config.num_hidden_layers
    assert not ours


@pytest.mark.parametrize("name", NEED_EAGER)
def test_a_model_made_by_the_class_of_an_accelerated_one_is_accelerated_like_any(name):
    model, plain, _ = pair(name)
    made = type(model)(copy.deepcopy(plain.config))
    made.load_state_dict(plain.state_dict())
    report = fastllm.accelerate(made)
    assert not any(entry.what == type(plain).__name__ and "Python refuses" in entry.why for entry in report.left)
    assert sum(entry.by == "attention" for entry in report.swapped) == sum(
        entry.by == "attention" for entry in fastllm.accelerate(copy.deepcopy(plain), dry_run=True).swapped
    )
    fastllm.revert(made)
    assert [type(part) for part in made.modules()] == [type(part) for part in plain.modules()]
