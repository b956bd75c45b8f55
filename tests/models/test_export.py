"""fastllm export: what it writes is read back, by transformers too."""

import json
import re
import subprocess
import sys

import pytest
import torch
from extras import needed
from thorough import THOROUGH
from toy import TOY

from fastllm.cli import main
from fastllm.data import Tokenizer
from fastllm.models import Transformer, load_model
from fastllm.training.checkpoints.checkpoint import save_model, write_manifest

LLAMA = TOY.replace(qk_norm=False, activation="swiglu", dropout=0.0, num_kv_heads=1)


@pytest.fixture
def model(tmp_path):
    model = Transformer(LLAMA.replace(vocab_size=257))
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(tmp_path / "run" / "model", model, Tokenizer.train(["some words"], 257))
    write_manifest(tmp_path / "run" / "model")
    return model.eval()


@pytest.mark.parametrize("layout", ["transformers", "fastllm"])
def test_what_is_exported_is_the_same_model(model, tmp_path, capsys, layout):
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--layout", layout]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    tokens = torch.randint(257, (2, 9))
    assert torch.equal(load_model(tmp_path / "out").eval()(tokens), model(tokens))
    ends = tmp_path / "out" / "generation_config.json"
    assert ends.exists() == (layout == "transformers")
    assert layout == "fastllm" or json.loads(ends.read_text()) == {"bos_token_id": 0, "eos_token_id": 0}
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_shape_that_transformers_has_not_is_refused_and_leaves_nothing(tmp_path, capsys):
    save_model(tmp_path, Transformer(TOY.replace(vocab_size=257)), Tokenizer.train(["some words"], 257))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "fastllm export: error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def turned(weight, heads):
    """Pairs (i, i + half) of each head's rows side by side."""
    rows = weight.view(heads, -1, weight.shape[1])
    half = rows.shape[1] // 2
    return torch.stack([rows[:, :half], rows[:, half:]], 2).reshape(weight.shape)


GPT = TOY.replace(positions="learned", norm="layer", bias=True, qk_norm=False, activation="gelu_tanh", dropout=0.0)


@pytest.mark.parametrize("shape", [LLAMA, LLAMA.replace(tie_embeddings=False, head_size=24), GPT])
def test_gguf_holds_the_weights_the_shape_and_the_tokenizer(tmp_path, capsys, shape):
    gguf = needed("gguf", "gguf")
    definition = json.loads(Tokenizer.train(["some words of some length"], 264).definition)
    size = len(definition["model"]["vocab"])
    definition["model"]["vocab"]["last"] = size + 1  # after an id that no token has
    tokenizer = Tokenizer(json.dumps(definition))
    model = Transformer(shape.replace(vocab_size=tokenizer.vocab_size))
    save_model(tmp_path / "model", model, tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "gguf"]) == 0
    assert "model.gguf" in capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    kind = values["general.architecture"]
    assert kind == ("gpt2" if shape is GPT else "llama")
    assert (values[f"{kind}.block_count"], values[f"{kind}.attention.head_count"]) == (2, 2)
    assert values[f"{kind}.context_length"] == 32
    assert values["tokenizer.ggml.tokens"] == [*map(tokenizer.token, range(size)), f"[PAD{size}]", "last"]
    assert values["tokenizer.ggml.token_type"] == [3] + [1] * (size - 1) + [5, 1]
    assert values["tokenizer.ggml.merges"][0] == "m e"
    assert values["tokenizer.ggml.bos_token_id"] == tokenizer.end_of_text
    found = {one.name: torch.tensor(one.data).view(*reversed(one.shape.tolist())) for one in reader.tensors}
    block, state = model.blocks[1], model.state_dict()
    expected = {"token_embd.weight": state["token_embedding.weight"], "output_norm.weight": state["norm.weight"]}
    expected["blk.1.attn_output.weight"] = block.attention.out.weight
    expected["blk.1.ffn_down.weight"] = block.mlp.down.weight
    if shape is GPT:
        expected |= {"position_embd.weight": state["position_embedding.weight"]}
        expected |= {"blk.1.attn_qkv.weight": block.attention.qkv.weight, "blk.1.ffn_up.bias": block.mlp.up.bias}
    else:
        query, key, value = block.attention.qkv.weight.split(block.attention.split)
        expected |= {"blk.1.attn_q.weight": turned(query, 2), "blk.1.attn_k.weight": turned(key, 1)}
        expected |= {"blk.1.attn_v.weight": value, "blk.1.ffn_gate.weight": block.mlp.up.weight.chunk(2)[0]}
        assert values["llama.attention.head_count_kv"] == 1
        assert values["llama.rope.dimension_count"] == shape.head_dim
    assert ("output.weight" in found) == (not shape.tie_embeddings)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.detach()), name
    assert sum(tensor.numel() for tensor in found.values()) == model.num_parameters()


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        (TOY, "bpe", "Llama needs activation 'swiglu'"), (LLAMA, "char", "byte-level BPE"),
        (GPT.replace(activation="gelu"), "bpe", "activation 'gelu_tanh'"),
    ],
)  # fmt: skip
def test_what_gguf_has_not_is_refused_and_leaves_nothing(tmp_path, capsys, shape, kind, message):
    needed("gguf", "gguf")
    tokenizer = Tokenizer.train(["some words"], 257, kind)
    save_model(tmp_path / "model", Transformer(shape.replace(vocab_size=tokenizer.vocab_size)), tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is POSIX's")
def test_a_gguf_file_that_does_not_fit_is_named_and_gone(tmp_path):
    needed("gguf", "gguf")
    tokenizer = Tokenizer.train(["some words"], 257)
    save_model(tmp_path / "model", Transformer(LLAMA.replace(vocab_size=tokenizer.vocab_size)), tokenizer)
    code = (
        "import sys; from resource import RLIMIT_FSIZE, setrlimit; from fastllm.cli import main; "
        "setrlimit(RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "export", "--format", "gguf", "model", "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert re.fullmatch(r"fastllm export: error: cannot write \S*model\.gguf: [^\n]*\n", ended.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@THOROUGH
# transformers takes GPT-2's 1,024 positions for granted there.
@pytest.mark.parametrize("shape", [LLAMA, GPT.replace(context_length=1024)])
def test_transformers_reads_the_same_logits_from_gguf(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(["some words"], 258)
    model = Transformer(shape.replace(vocab_size=tokenizer.vocab_size)).eval()
    save_model(tmp_path / "model", model, tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "gguf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    tokens = torch.randint(tokenizer.vocab_size, (2, 9))
    torch.testing.assert_close(theirs(tokens).logits.float(), model(tokens), rtol=1e-4, atol=1e-5)


@THOROUGH
def test_transformers_gives_the_same_logits(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(257, (2, 9))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    # The likeliest first token ends the text: theirs stops there, as generate does with a stop_token.
    end = int(model(torch.zeros(1, 1, dtype=torch.long)).argmax())
    assert theirs.generation_config.eos_token_id == 0
    theirs.generation_config.eos_token_id = end
    assert theirs.generate(max_new_tokens=5, do_sample=False).tolist() == [[0, end]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
