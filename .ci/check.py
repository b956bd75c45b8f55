"""Tries an installed wheel, away from the source tree: ops run, compile, and the extension is there and right."""

from functools import partial

import torch
from torch import nn

import fastllm
import fastllm.functional as F
import fastllm.kernels

x = torch.randn(4, 32, requires_grad=True)
fastllm.functional.layer_norm(x, (32,)).sum().backward()
assert x.grad is not None
assert "site-packages" in fastllm.__file__, fastllm.__file__

with fastllm.backend("native"):
    weight = torch.zeros(3, 32, dtype=torch.bfloat16, requires_grad=True)
    fastllm.functional.embedding(torch.ones(1000, dtype=torch.int64), weight).sum().backward()
assert (weight.grad[1] == 1000).all()


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.RMSNorm(16), nn.SiLU()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.norm(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


# Each as one graph, without a C++ compiler: what Dynamo takes differs from one torch to the next.
layer = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Embedding(8, 16), GatedMLP(), layer, GatedMLP())
assert fastllm.accelerate(model).swapped
heads, rows = torch.randn(3, 2, 2, 5, 16), torch.randn(6, 16)
for call in (
    partial(model, torch.randint(8, (2, 5))),
    partial(F.attention, *heads, causal=True),
    partial(F.scaled_dot_product_attention, *heads, is_causal=True),
    partial(F.layer_norm, rows, (16,)),
    partial(F.rms_norm, rows, (16,), torch.ones(16)),
    partial(F.swiglu, rows, rows),
    partial(F.cross_entropy, rows, torch.randint(16, (6,))),
    partial(F.linear_cross_entropy, rows, torch.randn(9, 16), torch.randint(9, (6,))),
):
    compiled = torch.compile(lambda call=call: call(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), call())

print("torch", torch.__version__, fastllm._C.build_info())
