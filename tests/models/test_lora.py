"""Adapters: what is trained, that they are saved, read again and merged, and what is refused."""

import copy
import shutil

import pytest
import torch
from cells import SHAPE, dataset, examples

from fastllm.cli import main
from fastllm.config import InputError
from fastllm.files import read_tensors
from fastllm.models import build_model, load_model
from fastllm.training.checkpoints.checkpoint import save_model
from fastllm.training.lora import ADAPTER, add_lora, has_lora, load_adapter, merged, save_adapter
from fastllm.training.objectives import ObjectiveConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pretrained encoder, and labelled texts."""
    folder = tmp_path_factory.mktemp("lora")
    rows = [f"{e['text']},{e['label']}\n" for e in examples("classify")]
    (folder / "labels.csv").write_text("text,label\n" + "".join(rows))
    tokenizer = dataset("classify", folder).tokenizer
    torch.manual_seed(0)
    shape = SHAPE.replace(encoder="transformer", decoder="none", heads=("mlm",), vocab_size=tokenizer.vocab_size)
    save_model(folder / "encoder", build_model(shape), tokenizer)
    return folder


def train(*arguments):
    try:
        return main(["train", "--quiet", *arguments])
    except SystemExit as exit_:
        return exit_.code


def test_adapters_are_trained_saved_read_again_and_merged(place):
    torch.manual_seed(1)
    base = load_model(place / "encoder").train()
    model = add_lora(copy.deepcopy(base), 2, {"masked.transform.weight"})
    tokens = torch.randint(SHAPE.vocab_size - 50, (2, 9))
    assert torch.equal(model.encode(tokens).states, base.encode(tokens).states)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained - {"masked.transform.weight"})
    assert len(trained) == 1 + 2 * 4  # qkv, out, up and down of one block
    for name in sorted(trained):  # a set's own order is another in each process
        torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    states = model.encode(tokens).states
    assert not torch.allclose(states, base.encode(tokens).states, atol=1e-2)
    plain = merged(model)
    assert has_lora(model)
    assert plain.state_dict().keys() == base.state_dict().keys()
    # In fp64: how far fp32 rounds the two orders of products apart is luck.
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(merged(wide).encode(tokens).states, wide.encode(tokens).states)
    save_adapter(model, place / ADAPTER)
    again = add_lora(load_model(place / "encoder"), 2, {"masked.transform.weight"})
    load_adapter(again, place / ADAPTER)
    assert torch.equal(again.encode(tokens).states, states)
    with pytest.raises(InputError, match="another model or rank"):
        load_adapter(add_lora(copy.deepcopy(base), 3, {"masked.transform.weight"}), place / ADAPTER)
    with torch.no_grad():
        base.encoder.norm.weight[0] += 1
    with pytest.raises(InputError, match="trained on other weights"):
        load_adapter(add_lora(base, 2, {"masked.transform.weight"}), place / ADAPTER)


def test_a_run_with_adapters_goes_on_as_if_it_had_not_stopped(place, monkeypatch):
    monkeypatch.chdir(place)
    fine = ["--objective", "classify", "--pretrained", "encoder", "--data", "labels.csv", "--lora-rank", "2",
            "--optimizer", "adamw", "--batch-size", "4", "--dtype", "float32", "--device", "cpu",
            "--eval-interval", "0", "--checkpoint-interval", "2", "--steps", "4"]  # fmt: skip
    assert train(*fine, "--out", "whole") == 0
    shutil.copytree("whole", "part")
    shutil.rmtree("part/checkpoints/step-00000004")
    shutil.rmtree("part/model")
    assert train("--resume", "part") == 0
    whole, part = (read_tensors(place / run / "model" / "model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    adapter = read_tensors(place / "whole" / "model" / ADAPTER)
    assert {"classifier.weight", "pooler.weight", "frozen"} < set(adapter)
    before = load_model("encoder").state_dict()
    after = load_model("whole/model").state_dict()
    assert torch.equal(before["encoder.norm.weight"], after["encoder.norm.weight"])
    assert torch.equal(before["encoder.token_embedding.weight"], after["encoder.token_embedding.weight"])
    assert not torch.equal(before["encoder.blocks.0.mlp.up.weight"], after["encoder.blocks.0.mlp.up.weight"])


def test_what_is_refused(monkeypatch):
    with pytest.raises(InputError, match="lora_rank: adapters are added to a pretrained model"):
        ObjectiveConfig("classify", lora_rank=4)
    monkeypatch.setattr("fastllm.training.objective_config.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need peft: pip install 'fastllm\[lora\]'"):
        ObjectiveConfig("classify", lora_rank=4, pretrained="x")
