"""Calls of attention, and their comparison with the definition."""

import torch
from conftest import DEVICE

from fastllm.functional import attention
from fastllm.ops.attention.attention import attention_reference

BACKENDS = ["eager", "triton"]


def qkv(batch=1, heads=2, rows=20, cols=20, dim=8, heads_kv=None, dtype=torch.float32, scale=1.0):
    def make(*shape):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()

    heads_kv = heads_kv or heads
    return make(batch, heads, rows, dim), make(batch, heads_kv, cols, dim), make(batch, heads_kv, cols, dim)


def agree(tensors, rtol=2e-5, atol=2e-5, **kwargs):
    """``attention`` and the definition give the same outputs and gradients."""
    mine = attention(*tensors, **kwargs)
    true = attention_reference(*tensors, **kwargs)
    mine, true = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (mine, true))
    leaves = [*tensors, *(t for t in kwargs.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    grads = [torch.randn_like(o) for o in true]
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
    got = torch.autograd.grad(mine, leaves, grads, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(true, leaves, grads, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
    return mine, got
