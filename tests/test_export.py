"""fastllm export: what it writes is read back, by transformers too."""

import pytest
import torch
from toy import THOROUGH, TOY

from fastllm.cli import main
from fastllm.data import Tokenizer
from fastllm.models import Transformer, load_model
from fastllm.training.checkpoint import save_model, write_manifest

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
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_shape_that_transformers_has_not_is_refused_and_leaves_nothing(tmp_path, capsys):
    save_model(tmp_path, Transformer(TOY.replace(vocab_size=257)), Tokenizer.train(["some words"], 257))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "fastllm export: error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@THOROUGH
def test_transformers_gives_the_same_logits(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(257, (2, 9))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
