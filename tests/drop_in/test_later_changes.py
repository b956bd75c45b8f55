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
