"""Tuning without a GPU: the walk, the table that launchers ask, its rewriting on a copy, the refusal."""

from datetime import date
from unittest import mock

import pytest
import torch

import fastllm
from fastllm.bench import command, tune
from fastllm.bench.run import plan
from fastllm.kernels import launch as _launch
from fastllm.kernels.attention import tiles


def test_the_walk_ends_where_no_neighbour_is_faster():
    def cost(settings):
        return abs(settings["BLOCK"] - 256) + 10 * abs(settings["num_warps"] - 8)

    tried = []

    def faster(new, old):
        tried.append(new)
        return cost(new) < cost(old)

    assert tune.search({"BLOCK": 1024, "num_warps": 1}, faster) == {"BLOCK": 256, "num_warps": 8}
    assert len(tried) == len({tuple(t.items()) for t in tried})
    assert tune.search({"BLOCK": 1}, lambda new, old: False) == {"BLOCK": 1}
    assert list(tune.neighbours({"a": 1, "b": 4})) == [{"a": 2, "b": 4}, {"a": 1, "b": 2}, {"a": 1, "b": 8}]


def test_the_walk_comes_to_a_pipeline_that_is_a_stage_shorter():
    start = {"BLOCK_M": 64, "num_stages": 3}
    assert tune.search(start, lambda new, old: new["num_stages"] == 2 < old["num_stages"]) == start | {"num_stages": 2}


def test_the_walk_comes_to_two_blocks_of_attention_on_a_multiprocessor():
    """96 KB of shared memory and 128 registers a thread: what neither a stage less nor a bound gives alone."""
    start = tiles.forward_tile(128, torch.bfloat16, 90, 0)
    two = start | {"num_stages": 2, "maxnreg": 128}
    assert start["num_stages"] == 3
    assert tune.search(start, lambda new, old: new == two) == two


def test_the_table_is_rewritten_with_where_and_when():
    text = tune.TABLE.read_text(encoding="utf-8")
    first = {("gated_fwd", 90, 1, 2048, 2): {"BLOCK_M": 1, "BLOCK_N": 4096, "num_warps": 8}}
    once = tune.rewrite(text, first, "NVIDIA H200", date(2026, 11, 20))
    assert "# NVIDIA H200, 2026-11-20" in once
    more = {("norm_fwd", 90, 1, 4096, 2, False): {"BLOCK_M": 1, "num_warps": 16}}
    twice = tune.rewrite(once, more, "NVIDIA H200", date(2026, 11, 20))
    assert twice.count("# NVIDIA H200") == 1
    names = {}
    exec(twice, names)
    assert names["TUNED"] == first | more
    assert all(len(line) <= 120 for line in twice.splitlines())
    assert tune.rewrite(twice, more, "NVIDIA H200", date(2026, 11, 20)) == twice
    with pytest.raises(ValueError, match="no table TUNED"):
        tune.rewrite("x = 1", first, "NVIDIA H200", date(2026, 11, 20))


# Each with the launchers that ask in its forward and backward.
ASKS = {
    "swiglu": {"gated_fwd", "gated_bwd"},
    "norm": {"norm_fwd", "norm_bwd", "norm_column_sum"},
    "long norm": {"norm_fwd_row", "norm_bwd_row", "norm_column_sum"},
    "cross_entropy": {"cross_entropy_fwd", "cross_entropy_mass", "cross_entropy_sum", "cross_entropy_scale"},
    "cross_entropy of rows": {"cross_entropy_fwd", "cross_entropy_bwd"},
    "rotary": {"rotary"},
    "attention": {
        "attention_split", "attention_fwd", "attention_delta", "attention_bwd_dkdv", "attention_bwd_dq",
        "attention_dbias",
    },
    "decoding": {"attention_split", "attention_merge"},
}  # fmt: skip


def _call(name, device):
    """A function and its tensors."""
    F = fastllm.functional

    def make(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    weight, target = make(64), torch.arange(8, device=device)
    angles = torch.rand(8, 8, device=device)
    return {
        "swiglu": (F.swiglu, make(8, 64), make(8, 64)),
        "norm": (lambda x, w: F.layer_norm(x, (64,), w), make(8, 64), weight),
        "long norm": (lambda x, w: F.layer_norm(x, (9000,), w), make(1, 9000), make(9000)),
        "cross_entropy": (lambda x: F.cross_entropy(x, target), make(8, 64)),
        "cross_entropy of rows": (lambda x: F.cross_entropy(x, target, reduction="none"), make(8, 64)),
        "rotary": (lambda x: F.rotary_embedding(x, None, angles.cos(), angles.sin())[0], make(1, 2, 8, 16)),
        "attention": (
            lambda q, k, v, b: F.attention(q, k, v, bias=b), *(make(1, 1, 9, 16) for _ in range(3)), make(9, 9),
        ),
        "decoding": (F.attention, *(make(1, 1, n, 16).detach() for n in (1, 513, 513))),
    }[name]  # fmt: skip


@pytest.mark.runs_on("gpu", "interpreter")
@pytest.mark.parametrize("name", ASKS)
def test_launchers_take_what_the_table_says(device, name):
    table = tune.Table()
    function, *leaves = _call(name, device)

    def results():
        out = function(*leaves)
        learnt = [x for x in leaves if x.requires_grad]
        return out, *(torch.autograd.grad(out, learnt, torch.full_like(out, 0.5)) if learnt else ())

    with mock.patch.object(_launch, "TUNED", table), fastllm.backend("triton"):
        expected = results()
        asked = dict(table.asked)
        assert {key[0] for key in asked} == ASKS[name]
        for key, settings in asked.items():
            for trial in tune.neighbours(settings):
                table.trial = {key: trial}
                torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.runs_on("gpu", "interpreter")
def test_a_setting_is_taken_that_is_right_and_faster(device, small, monkeypatch):
    table = tune.Table()
    with mock.patch.object(_launch, "TUNED", table), fastllm.backend("triton"):
        trials = tune._Trials(plan([small], ["first"])[0], torch.float32, device, table)
        key, start = next(iter(table.asked.items()))
        slower = {name: 2 * value for name, value in start.items()}
        monkeypatch.setattr(tune, "_Switching", mock.Mock())  # it flushes a GPU's cache
        # Seconds that grow with the settings.
        monkeypatch.setattr(tune, "interleaved", lambda runs, *_, **__: {
            name: [float(sum(settings.values()))] * 9 for name, (settings, _) in runs.items()
        })  # fmt: skip
        assert trials.is_faster(key, start, slower)
        assert not trials.is_faster(key, slower, start)
        assert not trials.is_faster(key, start, start)
        monkeypatch.setattr(trials.judge, "problem", lambda function: "wrong")
        assert not trials.is_faster(key, start, slower)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU here: there is nothing to refuse")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["swiglu", "--tune"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--tune: there is no GPU here, and settings are only worth what was measured")
    )
