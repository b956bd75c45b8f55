"""Gated MLPs that nobody had in mind: dropouts, repairs and casts in them, and forwards of two minds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm


class Gated(nn.Module):
    def __init__(self, where=()):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.25)
        self.activation = nn.GELU()
        self.where = where

    def at(self, place, x):
        parts = {"first": self.first, "second": self.second, "clamp": lambda x: x.clamp(-99, 99)}
        parts["function"] = lambda x: F.dropout(x, 0.5, self.training)
        for where, name in self.where:
            x = parts[name](x) if where == place else x
        return x

    def forward(self, x):
        x = self.at("input", x)
        return self.at("outer", self.down(self.at("inner", self.activation(self.gate(x)) * self.up(x))))


class ByRank(Gated):
    def forward(self, x):
        return super().forward(x) * (1 if x.dim() == 3 else 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("where", "served"),
    [
        ((), True),
        ((("inner", "first"),), True),
        ((("outer", "second"),), True),
        ((("inner", "second"), ("outer", "first")), True),
        ((("input", "first"),), False),
        ((("inner", "first"), ("inner", "second")), False),
        ((("inner", "function"),), False),
        ((("inner", "clamp"),), False),
        (None, False),
    ],
)
def test_gated_mlps_with_dropouts_anywhere(where, served, training):
    mlp = (Gated(where) if where is not None else ByRank()).train(training)
    other = copy.deepcopy(mlp)
    assert bool(fastllm.accelerate(mlp).swapped) is served
    x = torch.randn(2, 8)
    for mode in (True, False):
        torch.manual_seed(0)
        got = mlp.train(mode)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, other.train(mode)(x))
    for each in (mlp, other):
        each.activation.approximate = "tanh"
    torch.testing.assert_close(mlp(100 * x), other(100 * x), rtol=1e-6, atol=1e-6)


class GatedPlain(nn.Module):
    """down(silu(gate(x)) * up(x)), with ``after`` it."""

    def __init__(self, after=lambda y, x: y):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.after = after

    def forward(self, x):
        return self.after(self.down(F.silu(self.gate(x)) * self.up(x)), x)


class WithoutAWeightsGradient(GatedPlain):
    def forward(self, x):
        return F.linear(F.silu(self.gate(x)) * self.up(x), self.down.weight.detach(), self.down.bias)


class ByLayout(GatedPlain):
    def forward(self, x):
        return super().forward(x) * (1 if x.is_contiguous() else 2)


@pytest.mark.parametrize(
    "build",
    [WithoutAWeightsGradient, ByLayout, lambda: GatedPlain(lambda y, x: y.nan_to_num())],
    ids=["detached", "layout", "repaired"],
)
def test_gated_mlps_that_are_others_in_some_call_are_left(build):
    mlp = build()
    assert fastllm.accelerate(mlp).swapped == []


# Autocast's dtype, None for none, and that of what is given.
FLOAT, BFLOAT, HALF = (None, torch.float32), (None, torch.bfloat16), (None, torch.float16)
AUTO_BFLOAT, AUTO_HALF = (torch.bfloat16, torch.float32), (torch.float16, torch.float32)
AUTO_HALF_OF_HALF = (torch.float16, torch.float16)


@pytest.mark.parametrize(
    ("after", "own"),
    [
        (lambda y, x: y.to(x.dtype), [AUTO_BFLOAT, AUTO_HALF, AUTO_HALF_OF_HALF]),
        (
            lambda y, x: y.to(torch.promote_types(x.dtype, torch.float32)),
            [BFLOAT, HALF, AUTO_BFLOAT, AUTO_HALF, AUTO_HALF_OF_HALF],
        ),
        (lambda y, x: y.clamp(-6e4, 6e4) if y.dtype == torch.float16 else y, [HALF, AUTO_HALF, AUTO_HALF_OF_HALF]),
        (lambda y, x: y.clamp(-6e4, 6e4) if x.dtype == torch.float16 else y, [HALF, AUTO_HALF_OF_HALF]),
        (lambda y, x: y, []),
    ],
    ids=["input's", "float32", "clamped", "clamped by input", "plain"],
)
def test_a_gated_mlp_keeps_its_forward_where_it_casts_or_repairs(after, own):
    mlp = GatedPlain(after)
    report = fastllm.accelerate(mlp)
    assert report.swapped
    other = copy.deepcopy(mlp)
    fastllm.revert(other)
    x = torch.randn(3, 8) * 100
    for mode in (FLOAT, BFLOAT, HALF, AUTO_BFLOAT, AUTO_HALF, AUTO_HALF_OF_HALF):
        autocast, dtype = mode
        enabled, narrow = autocast is not None, autocast or torch.bfloat16
        with torch.autocast("cpu", narrow, enabled=enabled), report.calls() as calls:
            got = mlp.to(dtype)(x.to(dtype))
            want = other.to(dtype)(x.to(dtype))
        assert got.dtype == want.dtype
        assert torch.equal(got.isfinite(), want.isfinite())
        assert ("own" in calls.backends) is (mode in own), mode
