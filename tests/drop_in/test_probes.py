"""Mistakes that drop-in kernels have been caught at, each tried on an accelerated module with the kernels themselves.

Others are where they belong: residuals around a norm in test_drop_in.py; an auxiliary loss on the logits, frozen hidden
states, classes out of range and nothing but ignored targets in test_drop_in_deferred.py; sums of a 16-bit head's
gradient over many chunks in test_linear_cross_entropy.py.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_as_true
from torch import nn

import fastllm

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


@pytest.fixture(autouse=True)
def _kernels():
    with fastllm.backend("triton"):
        yield


def both(module):
    module = module.to(DEVICE)
    other = copy.deepcopy(module)
    assert fastllm.accelerate(module).swapped
    return module, other


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_gated_mlp_backward_twice():
    mlp, _ = both(Gated())
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    y = mlp(x).square().sum()
    first = torch.autograd.grad(y, [x, *mlp.parameters()], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, [x, *mlp.parameters()]), strict=True))


def test_cross_entropy_backward_twice_with_an_upstream_gradient():
    loss, other = both(nn.CrossEntropyLoss())
    logits = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    target = torch.randint(40, (6,), device=DEVICE)
    before = logits.detach().clone()
    value = 2.0 * loss(logits, target)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0], torch.autograd.grad(2.0 * other(logits, target), logits)[0])
    assert torch.equal(logits, before)


def test_cross_entropy_without_gradients_leaves_ignored_rows_alone():
    loss, _ = both(nn.CrossEntropyLoss())
    logits = torch.randn(4, 20, device=DEVICE)
    before = logits.clone()
    with torch.no_grad():
        loss(logits, torch.tensor([1, -100, 2, -100], device=DEVICE))
    assert torch.equal(logits, before)


def test_a_masked_vocabulary_longer_than_a_block():
    loss, other = both(nn.CrossEntropyLoss())
    logits = torch.randn(2, 32768 + 100, device=DEVICE)
    logits[:, :32768] = -torch.inf
    target = torch.tensor([32800, 32867], device=DEVICE)
    torch.testing.assert_close(loss(logits, target), other(logits, target))


def test_empty_batches_and_forms_of_targets():
    loss, other = both(nn.CrossEntropyLoss())
    table, _ = both(nn.Embedding(5, 8, padding_idx=1))
    norm, _ = both(nn.RMSNorm(8))
    assert loss(torch.randn(0, 7, device=DEVICE), torch.zeros(0, dtype=torch.long, device=DEVICE)).isnan()
    assert table(torch.zeros(0, 3, dtype=torch.long, device=DEVICE)).shape == (0, 3, 8)
    assert norm(torch.randn(0, 8, device=DEVICE)).shape == (0, 8)
    assert loss(torch.randn(3, 7, device=DEVICE), torch.full((3,), -100, device=DEVICE)).isnan()
    table.weight.data[1] = 3.0
    assert table(torch.tensor([1], device=DEVICE)).eq(3).all()
    logits = torch.randn(2, 7, 4, device=DEVICE)
    for target in (torch.randint(7, (2, 4), device=DEVICE), torch.softmax(torch.randn_like(logits), 1)):
        torch.testing.assert_close(loss(logits, target), other(logits, target))


def test_the_mean_of_a_bf16_loss_is_summed_in_fp32():
    loss, other = both(nn.CrossEntropyLoss())
    logits = (2 * torch.randn(300, 50, device=DEVICE)).bfloat16()
    target = torch.randint(50, (300,), device=DEVICE)
    assert_as_true(loss(logits, target), other(logits.double(), target), other(logits, target), torch.bfloat16, "loss")


def test_norms_without_bias_and_wider_than_a_block():
    norm, other = both(nn.LayerNorm(24, bias=False))
    x = torch.randn(3, 24, device=DEVICE)
    torch.testing.assert_close(norm(x), other(x))
    norm, other = both(nn.RMSNorm(65537))
    x = torch.randn(2, 65537, device=DEVICE)
    torch.testing.assert_close(norm(x), other(x), rtol=1e-5, atol=1e-5)


def test_fp64_vmap_and_double_backward():
    norm, other = both(nn.LayerNorm(8))
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    second = []
    for each in (norm, other):
        (grad,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)
    with fastllm.backend("auto"):
        wide = x.detach().double().requires_grad_()
        assert torch.autograd.gradcheck(norm.double(), wide)
        assert torch.equal(torch.vmap(norm)(wide), torch.vmap(other.double())(wide))


@pytest.mark.runs_on("anywhere")
def test_importing_starts_no_device_and_brings_no_transformers():
    code = "import sys, fastllm, torch; assert not torch.cuda.is_initialized() and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
