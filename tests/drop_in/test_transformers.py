"""What transformers' own conventions ask of an accelerated model: losses, outputs, caches, adapters, configurations."""

import copy
import json
import pickle

import pytest
import torch
from architectures import VOCABULARY, attentions, build, pair, same_gradients
from torch import nn

import fastllm
from fastllm.drop_in.deferred import Deferred
from fastllm.drop_in.swap import Accelerated

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


# Bart's and BERT's loss takes no number of items.
LOSSES = [(name, {}) for name in ("llama", "gemma2", "granite", "bart", "bert")] + [
    (name, {"num_items_in_batch": items}) for name in ("llama", "gemma2", "granite") for items in (7, torch.tensor(5))
]


@pytest.mark.parametrize(("name", "options"), LOSSES, ids=str)
def test_the_installed_loss_convention_is_kept(name, options):
    model, other, inputs = pair(name)
    inputs["labels"][0, 3] = -100
    outputs, expected = model(**inputs, **options), other(**inputs, **options)
    assert type(outputs.logits) is Deferred
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert outputs.loss.dtype == expected.loss.dtype
    assert list(outputs) == list(expected)
    outputs.loss.backward()
    expected.loss.backward()
    same_gradients(model, other)
    torch.testing.assert_close(outputs.logits + 0, expected.logits)
    assert outputs.to_tuple()[1].shape == expected.logits.shape


def test_shift_labels_and_logits_to_keep():
    model, other, inputs = pair()
    labels = inputs.pop("labels")
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for options in ({"labels": labels, "shift_labels": shifted}, {"labels": labels[:, -4:], "logits_to_keep": 4}):
        torch.testing.assert_close(model(**inputs, **options).loss, other(**inputs, **options).loss)
    assert type(model(**inputs).logits) is Deferred
    torch.testing.assert_close(model(**inputs).logits + 0, other(**inputs).logits)


def test_one_configuration_object_for_two_instances():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model, other = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    fastllm.accelerate(model)
    assert attentions(model) == {"fastllm"}
    assert attentions(other) == {"sdpa"}
    assert model.config is model.model.config is other.config is config
    assert config._attn_implementation == "sdpa"
    fastllm.revert(model)
    assert attentions(model) == {"sdpa"}
    assert model.model.layers[0].self_attn.config is config
    fastllm.accelerate(other)
    fastllm.revert(other)
    assert other.config is config
    fresh = transformers.LlamaForCausalLM(config)
    assert fresh.config._attn_implementation == "sdpa"
    assert type(fresh.model.norm).__name__ == "LlamaRMSNorm"
    assert not isinstance(fresh.model.norm, Accelerated)


def test_nothing_of_torch_or_transformers_is_replaced():
    from transformers.models.llama import modeling_llama

    watched = [torch.nn.functional, torch.nn, modeling_llama, transformers.loss.loss_utils]
    before = [dict(vars(module)) for module in watched]
    model, _, inputs = pair()
    model(**inputs).loss.backward()
    for module, names in zip(watched, before, strict=True):
        assert {n: id(v) for n, v in vars(module).items()} == {n: id(v) for n, v in names.items()}


def test_generation_with_a_cache_gives_the_same_tokens():
    model, other, inputs = pair()
    model.eval()
    other.eval()
    prompt = inputs["input_ids"][:, :5]
    for options in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}, {"cache_implementation": "static"}):
        got = model.generate(prompt, max_new_tokens=6, pad_token_id=0, **options)
        assert torch.equal(got, other.generate(prompt, max_new_tokens=6, pad_token_id=0, **options))


def test_attention_that_was_asked_for_is_left():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    report = fastllm.accelerate(model)
    assert {e.why for e in report.left if e.path == ""} == {'"eager" attention was asked for, which gives its weights'}
    ids = torch.arange(6)[None]
    assert model(ids, output_attentions=True).attentions[0].shape == (1, 4, 6, 6)
    assert any("attention" in e.by for e in fastllm.accelerate(build("gemma2")[0]).swapped)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5", "mistral"])
def test_soft_caps_sinks_biases_and_windows_of_attention(name):
    """Attention alone, in evaluation, with padding: what sdpa cannot do for Gemma 2 and gpt-oss, ours can."""
    model, other, inputs = pair(name, only="attention")
    model.eval()
    other.eval()
    with torch.no_grad():
        got, want = model(**inputs), other(**inputs)
    assert fastllm.revert(model) > 0
    keep = inputs["labels"] != -100
    torch.testing.assert_close(got.logits[keep], want.logits[keep], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss)


def test_saving_loading_and_pickling(tmp_path):
    model, other, inputs = pair()
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert again.config._attn_implementation == "sdpa"
    assert "fastllm" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(again(**inputs).loss, other(**inputs).loss, rtol=0, atol=0)
    fastllm.accelerate(again)
    again.load_state_dict(other.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert attentions(copied) == {"fastllm"}
        torch.testing.assert_close(copied(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
        fastllm.revert(copied)
        assert attentions(copied) == {"sdpa"}
        assert torch.equal(copied(**inputs).loss, other(**inputs).loss)


def test_tied_embeddings_and_new_vocabularies():
    model, _, inputs = pair("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(**inputs).logits.shape[-1] == VOCABULARY + 8
    model(**inputs).loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_lora_on_embeddings_and_head_trains_what_it_should():
    """trl #4612: with Liger-Kernel an adapter on the head is silently not trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "embed_tokens", "lm_head"])
    grads = {}
    for order in ("before", "after", "never"):
        model, inputs = build("llama")
        if order == "before":
            fastllm.accelerate(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        if order == "after":
            fastllm.accelerate(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(2))
        model(**inputs).loss.backward()
        grads[order] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in grads["never"])
    for order in ("before", "after"):
        assert grads[order].keys() == grads["never"].keys()
        for name, grad in grads["never"].items():
            torch.testing.assert_close(grads[order][name], grad, msg=f"{order}: {name}")


def test_activation_checkpointing():
    model, other, inputs = pair()
    for each in (model, other):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        each(**inputs, use_cache=False).loss.backward()
    same_gradients(model, other)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_activation_checkpointing_under_autocast(name):
    """The first layer's attention then gets queries in fp32 and values in 16 bits."""
    model, _, inputs = pair(name)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, again):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(**inputs, use_cache=False).loss
        loss.backward()
    same_gradients(again, model)


def vision_and_gemma2():
    """A language model whose own attention is eager, within a model whose own is sdpa."""
    attention = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = transformers.PaliGemmaConfig(
        text_config=dict(model_type="gemma2", vocab_size=VOCABULARY, head_dim=8, num_key_value_heads=2, **attention),
        vision_config=dict(model_type="siglip_vision_model", image_size=16, patch_size=8, **attention),
        image_token_index=5, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(6, VOCABULARY, (2, 12))
    ids[:, :4] = 5
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids), labels=ids,
        pixel_values=torch.randn(2, 3, 16, 16),
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), inputs


def test_the_configuration_of_a_language_model_within_a_model_stays_that_models():
    """Code around the language model finds it by its configuration: set_attn_implementation does."""
    model, inputs = vision_and_gemma2()
    other = copy.deepcopy(model)
    config, text = model.config, model.config.text_config
    report = fastllm.accelerate(model)
    language_model = model.model.language_model

    def same_configuration():
        return model.config is config and config.text_config is text is language_model.config

    assert same_configuration()
    assert attentions(language_model) == {text._attn_implementation}
    with report.calls() as calls:
        loss = model(**inputs).loss
    attending = {served.path: served.backend for served in calls if served.what == "Gemma2Attention"}
    assert len(attending) == 2
    assert "own" not in attending.values()
    assert same_configuration()
    torch.testing.assert_close(loss, other(**inputs).loss)
    copied = copy.deepcopy(model)
    assert copied.config.text_config is copied.model.language_model.config is not text
    torch.testing.assert_close(copied(**inputs).loss, loss)
    model.set_attn_implementation({"": "eager"})
    assert language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).loss, loss)
    own = copy.deepcopy(text)
    language_model.config = own
    assert language_model.config is own
    del language_model.config
    assert not hasattr(language_model, "config")
    language_model.config = own
    fastllm.revert(model)
    assert language_model.config is own
    assert not [name for name in vars(language_model) if "fastllm" in name]


def test_a_model_of_eager_attention_compiles_whole():
    model, other, inputs = pair("gemma2", only="attention")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = (each(**inputs, use_cache=False).loss for each in (compiled, other))
    torch.testing.assert_close(got, want)


def test_models_within_models_have_their_own_attention():
    model, _, inputs = pair("clip")
    for part in (model, model.text_model, model.vision_model):
        assert attentions(part) == {"fastllm"}
    assert model.config.text_config is model.text_model.config
    assert model(**inputs).loss.isfinite()
    assert fastllm.revert(model)
    assert attentions(model) == {"sdpa"}


def test_the_command_reports_on_a_folder_and_reads_no_weights(tmp_path, capsys):
    from fastllm.cli import main

    build("llama")[0].config.save_pretrained(tmp_path)
    assert main(["accelerate", str(tmp_path), "--report", "--shape", "2x16"]) == 0
    said = capsys.readouterr().out
    assert "LlamaRMSNorm" in said
    assert "one training step of 2 x 16 tokens, modelled for an H200" in said
    assert main(["accelerate", str(tmp_path), "--json", "--only", "rms_norm"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["by"] for entry in report["swapped"]} == {"rms_norm"}
    assert report["estimate"]["bytes"] > 0
    for arguments, message in (
        ([str(tmp_path / "none")], "no config.json there"),
        ([str(tmp_path), "--shape", "2"], "--shape: expected two positive numbers"),
        ([str(tmp_path), "--skip", "rms"], "is neither an op"),
    ):
        assert main(["accelerate", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"num_attention_heads": "two"}, [], "transformers cannot build this model"),
        ({"layer_norm_epsilon": "x"}, ["--run"], "transformers cannot build this model"),
        ({"decoder_start_token_id": None}, ["--run"], "--run: T5ForConditionalGeneration does not take 1 x 4 tokens"),
    ],
)
def test_the_command_says_in_one_line_what_transformers_raises(change, arguments, message, tmp_path, capsys):
    from fastllm.cli import main

    values = build("t5")[0].config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(values | {"architectures": ["T5ForConditionalGeneration"]}))
    assert main(["accelerate", str(tmp_path), "--shape", "1x4", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
