"""Where cross-entropy's gradient lies: in the forward's memory, in the logits' where asked for, and nobody else's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import backend_fixture

import fastllm
from fastllm.functional import cross_entropy

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

backend = backend_fixture("eager", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_gradient_handed_out_is_the_callers_own(dtype, reduction):
    """The first backward gives away the forward's gradient; whatever becomes of it, the second is the same."""
    x = torch.randn(6, 40, device=DEVICE).to(dtype).requires_grad_()
    y = torch.tensor([1, -100, 3, 39, 0, 7], device=DEVICE)
    with fastllm.backend("triton"):
        loss = cross_entropy(x, y, reduction=reduction, label_smoothing=0.1)
        upstream = torch.rand(loss.shape, device=DEVICE).to(dtype)
        (first,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        assert torch.equal(second, kept)
        (doubled,) = torch.autograd.grad(loss, x, 2 * upstream)
        torch.testing.assert_close(doubled, 2 * kept)


def test_auxiliary_loss_on_the_same_logits(backend):
    hidden, w = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.randn(40, 8, device=DEVICE)
    y = torch.tensor([1, -100, 3, 39, 0, 7], device=DEVICE)

    def gradient(function):
        logits = hidden @ w.t()
        return torch.autograd.grad(function(logits, y) + logits.square().mean(), hidden)[0]

    torch.testing.assert_close(gradient(cross_entropy), gradient(F.cross_entropy))


def test_no_grad_leaves_the_logits_alone(backend):
    x, y = torch.randn(6, 40, device=DEVICE), torch.full((6,), -100, device=DEVICE)
    before = x.clone()
    with torch.no_grad():
        cross_entropy(x, y)
        cross_entropy(x, y, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_puts_the_gradient_where_the_logits_were(dtype):
    hidden = torch.randn(6, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    w = torch.randn(40, 8, device=DEVICE, dtype=dtype)
    y = torch.tensor([1, -100, 3, 39, 0, 7], device=DEVICE)
    with fastllm.backend("triton"):
        grads = []
        for inplace in (False, True):
            logits = hidden @ w.t()
            where = []
            logits.register_hook(lambda grad, where=where: where.append(grad.data_ptr()))
            loss = cross_entropy(logits, y, z_loss=0.1, inplace=inplace)
            grads.append(torch.autograd.grad(loss, hidden, retain_graph=True)[0])
            assert (where == [logits.data_ptr()]) is inplace
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, hidden)


def test_a_second_use_of_overwritten_logits_raises():
    hidden = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    y = torch.zeros(6, dtype=torch.long, device=DEVICE)
    with fastllm.backend("triton"):
        logits = hidden * 2
        other = logits.square().mean()
        cross_entropy(logits, y, inplace=True).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        with pytest.raises(ValueError, match=r"inplace.*leaf"):
            cross_entropy(torch.randn(6, 8, device=DEVICE, requires_grad=True), y, inplace=True)
