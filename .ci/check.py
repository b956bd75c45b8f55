"""Tries an installed wheel, away from the source tree: ops run, and the extension is there and right."""

import torch

import fastllm
import fastllm.kernels

x = torch.randn(4, 32, requires_grad=True)
fastllm.functional.layer_norm(x, (32,)).sum().backward()
assert x.grad is not None
assert "site-packages" in fastllm.__file__, fastllm.__file__

with fastllm.backend("native"):
    weight = torch.zeros(3, 32, dtype=torch.bfloat16, requires_grad=True)
    fastllm.functional.embedding(torch.ones(1000, dtype=torch.int64), weight).sum().backward()
assert (weight.grad[1] == 1000).all()
print("torch", torch.__version__, fastllm._C.build_info())
