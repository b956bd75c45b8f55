"""torch.nn.attention.activate_flash_attention_impl("fastllm"): every scaled_dot_product_attention of the process."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)

import fastllm
from fastllm.drop_in import torch_switch as module
from fastllm.drop_in.torch_switch import KEYS

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


@pytest.fixture
def served(monkeypatch):
    """The switch on; how many calls were ours."""
    calls = []
    ours = module.scaled_dot_product_attention
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or ours(*a, **k))
    activate_flash_attention_impl("fastllm")
    yield calls
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def qkv(*shape):
    return [torch.randn(shape or (2, 2, 9, 8), device=DEVICE, requires_grad=True) for _ in range(3)]


def gradients(function, tensors, **kwargs):
    out = function(*tensors, **kwargs)
    grads = torch.autograd.grad(out.sin().sum(), tensors)
    return out, *grads


@pytest.mark.runs_on("anywhere")
def test_off_until_it_is_asked_for():
    assert "fastllm" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None


def registered() -> set[str]:
    """The keys, CUDA's among them, at which torch's dispatcher has a kernel of its own for the call."""
    name = "aten::scaled_dot_product_attention"
    return {key for key in KEYS if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


@pytest.mark.runs_on("anywhere")
def test_the_switch_registers_for_cpu_and_cuda_with_and_without_gradients():
    assert {"CPU", "CUDA", "AutogradCPU", "AutogradCUDA"} == set(KEYS)
    for _ in range(2):
        assert registered() == set()
        activate_flash_attention_impl("fastllm")
        assert registered() == set(KEYS)
        restore_flash_attention_impl()
    assert registered() == set()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_calls_are_ours_and_right_and_torchs_again_afterwards(served, backend):
    tensors = qkv()
    mask = torch.randn(9, 9, device=DEVICE)
    with fastllm.backend(backend):
        mine = [gradients(F.scaled_dot_product_attention, tensors, **k) for k in ({}, dict(is_causal=True))]
        mine.append(gradients(F.scaled_dot_product_attention, tensors, attn_mask=mask, scale=0.3))
    assert current_flash_attention_impl() == "fastllm"
    # What the eager backend itself asks of torch is not counted again.
    assert len(served) == 3
    restore_flash_attention_impl()
    torchs = [gradients(F.scaled_dot_product_attention, tensors, **k) for k in ({}, dict(is_causal=True))]
    torchs.append(gradients(F.scaled_dot_product_attention, tensors, attn_mask=mask, scale=0.3))
    assert len(served) == 3
    for a, b in zip(mine, torchs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def test_whatever_runs_it(served):
    q, k, v = qkv()
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True, device=DEVICE)
    x = torch.randn(2, 5, 16, device=DEVICE)
    layer(x, x, x, need_weights=False)
    assert len(served) == 1
    with torch.inference_mode():
        F.scaled_dot_product_attention(*(torch.randn(1, 2, 3, 8, device=DEVICE) for _ in "qkv"))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), fastllm.functional.scaled_dot_product_attention(q, k, v))
    assert len(served) >= 4
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), q)[0]
    got = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q)
    torch.testing.assert_close(got, expected)


def test_activating_twice_and_restoring(served):
    activate_flash_attention_impl("fastllm")
    F.scaled_dot_product_attention(*qkv())
    assert len(served) == 1
    restore_flash_attention_impl()
    assert current_flash_attention_impl() is None
    F.scaled_dot_product_attention(*qkv())
    assert len(served) == 1
