"""GPT-2's and Llama's weights as transformers writes them, read and written without it; proved by logits."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fastllm.models import Encoder, EncoderDecoder, Transformer, load_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
V = 64


def gpt2(**options):
    config = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=24, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **options}))


def llama(**options):
    config = dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options}))


MODELS = {
    "gpt2": gpt2,
    "gpt2_wide": lambda: gpt2(n_inner=40, activation_function="gelu", tie_word_embeddings=False),
    "llama": llama,
    "llama_wide_heads": lambda: llama(head_dim=16),
    "llama_tied": lambda: llama(tie_word_embeddings=True, rope_theta=500.0, num_key_value_heads=4),
}


def randomised(model):
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_and_out(name, tmp_path):
    theirs = randomised(MODELS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        want = theirs(ids).logits
        torch.testing.assert_close(ours(ids), want)
    ours.save_pretrained(tmp_path / "ours", layout="transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    back = Transformer.from_pretrained(tmp_path / "ours")
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert back.config == ours.config


def test_shards_sixteen_bits_and_names_without_their_prefix(tmp_path):
    theirs = randomised(llama()).bfloat16()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    ours = Transformer.from_pretrained(tmp_path / "shards")
    ids = torch.randint(V, (1, 5))
    assert next(ours.parameters()).dtype == torch.float32
    torch.testing.assert_close(ours(ids), theirs.float()(ids).logits)
    body = randomised(gpt2())
    body.transformer.save_pretrained(tmp_path / "body")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path / "body")(ids), body(ids).logits)


def test_encoders_and_encoder_decoders_come_as_what_they_are(tmp_path):
    sizes = dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    bert = randomised(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
    bert.save_pretrained(tmp_path / "bert")
    for ours in (Transformer.from_pretrained(tmp_path / "bert"), load_model(tmp_path / "bert")):
        assert type(ours) is Encoder
        ids = torch.randint(V, (2, 9))
        with torch.no_grad():
            logits = ours.masked_logits(ours.encode(ids).states)
            torch.testing.assert_close(logits, bert(ids).logits, rtol=1e-5, atol=2e-6)
    t5().save_pretrained(tmp_path / "t5")
    assert type(load_model(tmp_path / "t5")) is EncoderDecoder
    with pytest.raises(ValueError, match="describes a Encoder, not a EncoderDecoder"):
        EncoderDecoder.from_pretrained(tmp_path / "bert")


SMALL_BERT = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24,
)  # fmt: skip


def bert(**options):
    return randomised(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT, **options)))


def classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL_BERT))


def t5():
    sizes = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))


def test_a_head_for_masked_tokens_with_a_matrix_and_a_bias_of_its_own(tmp_path):
    theirs, ids = bert(tie_word_embeddings=False), torch.randint(V, (2, 9))
    assert not torch.equal(theirs.cls.predictions.decoder.bias, theirs.cls.predictions.bias)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        logits = ours.masked_logits(ours.encode(ids).states)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("model", [gpt2, lambda: llama(tie_word_embeddings=True)])
def test_another_head_than_the_table_is_its_own_whatever_the_configuration_says(model, tmp_path):
    model().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(V, 32)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # The body alone: whether transformers ties the head is not what is tested.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().base_model
    ours, ids = Transformer.from_pretrained(tmp_path), torch.randint(V, (2, 9))
    assert not ours.config.tie_embeddings
    with torch.no_grad():
        logits = theirs(ids).last_hidden_state @ weights["lm_head.weight"].T
        torch.testing.assert_close(ours(ids), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_by_name(dtype, tmp_path):
    llama().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name], weights[f"{name}_scale"] = (100 * weights[name]).to(dtype), torch.tensor([0.01])
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"blocks\.1\.attention\.out\.weight is {dtype}; quantised weights"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[" * 100_000,
        "null",
        "{}",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../b"}}',
    ],
)
def test_an_index_that_is_none_is_refused(index, tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        Transformer.from_pretrained(tmp_path)


def test_transformers_is_not_imported(tmp_path):
    gpt2().save_pretrained(tmp_path)
    code = (
        "import sys; from fastllm.models import Transformer; "
        f"Transformer.from_pretrained({str(tmp_path)!r}); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (gpt2, {"activation_function": "relu"}, "activation_function: expected 'gelu_new' or .* got 'relu'"),
        (gpt2, {"n_head": None}, "num_heads"),
        (llama, {"attention_bias": True}, "attention_bias: expected False, got True"),
        (llama, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected 'default', got 'yarn'"),
        (bert, {"is_decoder": True}, "is_decoder: expected False"),
        (bert, {"hidden_act": "relu"}, "hidden_act: expected gelu with a head for masked tokens, got 'relu'"),
        (llama, {"num_attention_heads": 0}, "num_heads: expected at least 1, got 0"),
        (llama, {"num_attention_heads": "4"}, "num_heads: expected int, got '4'"),
        (llama, {"rms_norm_eps": "1e-5"}, "norm_eps: expected float, got '1e-5'"),
        (llama, {"tie_word_embeddings": "false"}, "tie_embeddings: expected bool, got 'false'"),
        (llama, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected none"),
        (llama, {"num_hidden_layers": 1}, r"model\.layers\.1\..* is there, and the configuration has 1 layers"),
        (gpt2, {"n_layer": 1}, r"transformer\.h\.1\..* is there, and the configuration has 1 layers"),
        (llama, {"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        (
            classifier,
            {"id2label": ["bad", "good"]},
            "id2label: expected an object, got .*good",
        ),
        (t5, {"d_model": 0}, "config\\.json: d_model: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, change, message, tmp_path):
    model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", [llama, bert, t5])
@pytest.mark.parametrize("change", [lambda t: torch.zeros(()), torch.Tensor.flatten, lambda t: t.movedim(0, -1)])
def test_tensors_of_other_shapes_are_refused(model, change, tmp_path):
    model().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    changed = {name: change(tensor).clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    safetensors.torch.save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(tmp_path)):
        Transformer.from_pretrained(tmp_path)


def test_shapes_that_transformers_has_no_class_for(tmp_path):
    config = Transformer.config_class(
        vocab_size=V, context_length=24, num_layers=1, num_heads=2, hidden_size=16, positions="rotary", norm="rms",
        qk_norm=True, activation="swiglu", bias=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Llama needs .*qk_norm False \(here True\)"):
        Transformer(config).save_pretrained(tmp_path / "none", layout="transformers")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="layout must be fastllm or transformers, got 'hf'"):
        Transformer(config).save_pretrained(tmp_path, layout="hf")
