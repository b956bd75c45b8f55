"""What becomes of a module after accelerate(): attributes, parameters and parts that it gets, hooks on every module."""

import copy

import pytest
import torch
from torch import nn

import fastllm


class NormWithMore(nn.Module):
    """A norm whose code takes whatever it gets later."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.register_parameter("bias", None)
        self.register_buffer("gain", None)

    def forward(self, x):
        y = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        if self.bias is not None:
            y = y + self.bias
        if self.gain is not None:
            y = y * self.gain
        return y - self.shift if hasattr(self, "shift") else y


class MLP(nn.Module):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x)) * self.scale
        return self.last(y) if hasattr(self, "last") else y


def get(**values):
    def change(module):
        for name, value in values.items():
            setattr(module, name, value)

    return change


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (NormWithMore, get(scale=3.0)),
        (NormWithMore, get(bias=nn.Parameter(torch.full((16,), 0.5)))),
        (NormWithMore, get(gain=torch.full((16,), 0.5))),
        (NormWithMore, get(shift=torch.ones(16))),
        (NormWithMore, lambda module: module.register_buffer("shift", torch.ones(16))),
        (MLP, get(scale=3.0)),
        (MLP, get(last=nn.Tanh())),
        (MLP, lambda module: get(forward=torch.relu)(module.act)),
    ],
)
def test_what_a_module_gets_after_it_was_measured_is_taken(make, change):
    torch.manual_seed(0)
    other = make()
    model = copy.deepcopy(other)
    assert fastllm.accelerate(nn.Sequential(model)).swapped
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), other(x))
    before = other(x)
    for each in (model, other):
        change(each)
    assert not torch.allclose(before, other(x))
    torch.testing.assert_close(model(x), other(x))


def test_a_compiled_graph_sees_an_activation_of_another_forward():
    torch.manual_seed(0)
    other = nn.Sequential(MLP())
    model = copy.deepcopy(other)
    assert fastllm.accelerate(model).swapped
    torch.compiler.reset()
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(3, 16)
    torch.testing.assert_close(compiled(x), other(x))
    for each in (model, other):
        each[0].act.forward = torch.relu
    torch.testing.assert_close(compiled(x), other(x))


def test_marks_that_no_code_looks_for_change_nothing():
    model = nn.Sequential(NormWithMore(), MLP())
    report = fastllm.accelerate(model)
    for module in model:
        module.mark_of_a_tool = True
    with report.calls() as calls:
        model(torch.randn(3, 16))
    assert not [served for served in calls if served.backend == "own"]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_every_module_are_called_for_every_part(kind):
    calls = {
        "forward": lambda module, given, out: out * 1.5,
        "forward_pre": lambda module, given: (given[0] * 1.5,),
        "full_backward": lambda module, to_inputs, to_outputs: (to_inputs[0] * 1.5,),
        "full_backward_pre": lambda module, to_outputs: (to_outputs[0] * 1.5,),
    }
    register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    torch.manual_seed(0)
    other = nn.Sequential(MLP(), NormWithMore())
    model = copy.deepcopy(other)
    fastllm.accelerate(model)
    x = torch.randn(3, 16, requires_grad=True)
    results = []
    handle = register(calls[kind])
    try:
        for each in (model, other):
            out = each(x)
            results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *each.parameters()])))
    finally:
        handle.remove()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
