"""What two kernels share bit for bit, they share on a GPU too, where a * b + c may round once."""

import pytest
import torch
from contracting import contracting

import fastllm
from fastllm.functional import cross_entropy
from fastllm.kernels.cross_entropy import forward, logits

pytestmark = pytest.mark.runs_on("interpreter")

OPTIONS = [
    {},
    {"logit_scale": 3.0},
    {"softcap": 5.0},
    {"label_smoothing": 0.1},
    {"logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.05, "weight": True},
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _gradients(dtype, reduction, options, classes=300):
    """The gradient that the forward leaves, and the backward kernel's for the same upstream gradient."""
    torch.manual_seed(2)
    x = (torch.randn(6, classes) * 3).to(dtype).requires_grad_()
    y = torch.tensor([1, -100, 3, classes - 1, 0, 7])
    options = dict(options, reduction=reduction)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes) + 0.5
    with fastllm.backend("triton"):
        loss = cross_entropy(x, y, **options)
        upstream = torch.tensor(0.37, dtype=loss.dtype)
        first = torch.autograd.grad(loss, x, upstream, retain_graph=True)[0].clone()
        return first, torch.autograd.grad(loss, x, upstream)[0]


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("row", [forward.ROW, 0], ids=["whole", "in_blocks"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(o) or "plain")
def test_the_gradient_of_the_forward_is_that_of_the_backward(dtype, reduction, row, options, monkeypatch):
    monkeypatch.setattr(forward, "ROW", row)
    monkeypatch.setattr(forward, "WIDE_TURN", 4096)
    classes = 300 if row else 5000
    with contracting():
        left, computed = _gradients(dtype, reduction, options, classes)
    assert torch.equal(left, computed)


def test_a_compiler_that_may_fuse_would_tell_them_apart(monkeypatch):
    """The scaled logit less the maximum: a select lies between the two in the forward, and nothing in the backward."""
    monkeypatch.setitem(logits.EXACT, "enable_fp_fusion", True)
    with contracting() as found:
        left, computed = _gradients(torch.float32, "sum", {"logit_scale": 3.0})
    assert found.count > 0
    assert not torch.equal(left, computed)


def test_no_kernel_of_cross_entropy_lets_the_compiler_fuse():
    with contracting() as found:
        _gradients(torch.bfloat16, "mean", OPTIONS[-1])
    assert found.count == 0
