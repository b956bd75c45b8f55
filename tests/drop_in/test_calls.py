"""Report.calls(): what served each call of an accelerated model, forward and backward."""

import copy
import gc
import json
import pickle
import threading
import weakref

import pytest
import torch
from architectures import build
from torch import nn

import fastllm
from fastllm import backends
from fastllm.drop_in import calls as module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def small():
    return nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))


def counts(calls):
    return {(s.path, s.op, s.backend): (s.forward, s.backward) for s in calls}


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_every_call_and_every_backward_by_module_and_backend(backend):
    model = small()
    report = fastllm.accelerate(model)
    ids = torch.arange(6)[None]
    with fastllm.backend(backend), report.calls() as calls:
        for _ in range(2):
            model(ids).sum().backward()
        with torch.no_grad():
            model(ids)
    table = "eager" if backend == "eager" else "native"  # there is no embedding of Triton's
    ops = {("0", "embedding", table), ("1", "layer_norm", backend), ("3", "rms_norm", backend)}
    expected = dict.fromkeys(ops, (3, 2))
    assert counts(calls) == expected
    assert sum(calls.backends.values()) == 9
    assert {served.why for served in calls if served.backend == backend} == {"asked for"}
    assert {entry["path"] for entry in json.loads(calls.to_json())} == {"0", "1", "3"}
    assert all(path in str(calls) for path in ("0", "1", "3"))
    model(ids)
    assert counts(calls) == expected


def test_what_fell_back_is_told_with_the_reason():
    model = small()
    report = fastllm.accelerate(model)
    ids = torch.arange(6)[None]
    with report.calls() as calls, torch.autocast("cpu", torch.bfloat16):
        model[1](torch.randn(3, 8).bfloat16())
        model[3](torch.randn(3, 8).bfloat16())
        torch.func.vmap(model[1])(torch.randn(2, 3, 8))
        model[0](ids)
    own = {s.path: (s.forward, s.why) for s in calls if s.backend == "own"}
    assert own.keys() == {"1", "3"}
    assert own["1"][0] == 2
    assert all(why for _, why in own.values())
    layer = nn.MultiheadAttention(8, 2)
    report = fastllm.accelerate(layer)
    with report.calls() as calls:
        layer(*3 * [torch.randn(4, 1, 8)])
        layer(*3 * [torch.randn(4, 1, 8)], need_weights=False)
    assert [s.why for s in calls if s.backend == "own"] == ["weights are asked for (need_weights)"]
    assert sum(s.forward for s in calls if s.backend != "own") == 1


def test_a_language_model_step_counts_attention_its_head_and_its_gates():
    pytest.importorskip("transformers")
    model, inputs = build("llama")
    report = fastllm.accelerate(model)
    with report.calls() as calls:
        model(**inputs).loss.backward()
    by_op = {}
    for served in calls:
        assert served.forward == served.backward == 1, served
        by_op[served.op] = by_op.get(served.op, 0) + 1
    assert by_op["rms_norm"] == 5
    assert by_op["swiglu"] == by_op["scaled_dot_product_attention"] == 2
    assert by_op["linear_cross_entropy"] == by_op["embedding"] == 1
    assert {served.path for served in calls if served.op == "linear_cross_entropy"} == {"lm_head"}
    with report.calls() as calls:
        model.eval()(**inputs)
    assert [s.backend for s in calls if s.op == "linear_cross_entropy"] == ["own"]


def test_a_model_that_needs_eager_attention_says_when_it_takes_it():
    pytest.importorskip("transformers")
    model, inputs = build("gemma2")
    report = fastllm.accelerate(model)
    with report.calls() as calls:
        model(**inputs, output_attentions=True)
    assert {s.path for s in calls if s.backend == "own"} >= {""}
    assert not [s for s in calls if s.op == "attention" and s.backend != "own"]


def test_two_models_at_once_and_two_threads():
    models = [small(), small()]
    reports = [fastllm.accelerate(model) for model in models]
    ids = torch.arange(6)[None]
    with reports[0].calls() as first, reports[1].calls() as second:
        threads = [threading.Thread(target=lambda m=m: [m(ids).sum().backward() for _ in range(5)]) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with reports[0].calls() as inner:
            models[0](ids)
    assert {forward for forward, _ in counts(first).values()} == {6}
    assert set(counts(second).values()) == {(5, 5)}
    assert set(counts(inner).values()) == {(1, 0)}


def test_nothing_is_watched_outside_and_nothing_kept_alive():
    model = small()
    report = fastllm.accelerate(model)
    with pytest.raises(ZeroDivisionError), report.calls():
        1 / 0  # noqa: B018
    assert not module._watching
    assert not backends._observers
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert copied.swapped == report.swapped
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="gone"):
        report.calls()


def test_a_compiled_graph_stays_one_graph_while_watched():
    model = small()
    report = fastllm.accelerate(model)
    ids = torch.arange(6)[None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with report.calls() as calls:
        compiled(ids).sum().backward()
    assert not list(calls)
    assert "no call" in str(calls)


def test_the_command_runs_a_step_and_prints_what_served_it(tmp_path, capsys):
    pytest.importorskip("transformers")
    from fastllm.cli import main

    config = build("llama")[0].config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert main(["accelerate", str(tmp_path), "--run", "--shape", "2x8"]) == 0
    said = capsys.readouterr().out
    assert "what served one training step of 2 x 8 random tokens here" in said
    assert "model.layers.0.self_attn" in said
    assert main(["accelerate", str(tmp_path), "--run", "--json"]) == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    assert {"rms_norm", "linear_cross_entropy"} <= {entry["op"] for entry in calls}
    assert all(entry["forward"] and entry["backward"] for entry in calls)
    build("vit")[0].config.save_pretrained(tmp_path)
    assert main(["accelerate", str(tmp_path), "--run"]) == 2
    assert "expected a model of token ids" in capsys.readouterr().err
