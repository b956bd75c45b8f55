"""linear_cross_entropy in PyTorch's other forms, probabilities and a weight of three dimensions, and its module."""

import pytest
import torch
from conftest import DEVICE
from contract import backend_fixture

import fastllm
from fastllm.functional import linear_cross_entropy

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

backend = backend_fixture("auto", "eager", "triton")


@pytest.mark.parametrize("form", ["probabilities", "weight of three dimensions"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_backward(backend, form, reduction):
    x, head = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((4, 8), (2, 3, 8)))
    target = torch.randint(0, 2, (4, 3), device=DEVICE)
    if form == "probabilities":
        head, target = head.flatten(0, 1), torch.rand(4, 6, device=DEVICE)
    loss = linear_cross_entropy(x, head, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, head), retain_graph=True)
    second = torch.autograd.grad(loss, (x, head))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["probabilities", "weight of three dimensions"])
def test_a_layer_of_two_dtypes_or_devices_is_refused_unless_autocast_casts_it(form):
    x, head = torch.randn(4, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    target = torch.randint(0, 2, (4, 3), device=DEVICE)
    if form == "probabilities":
        head, target = head.flatten(0, 1), torch.rand(4, 6, device=DEVICE)
    bias = torch.zeros(head.shape[:-1], device=DEVICE)
    for layer in ((x, head.bfloat16(), None), (x.bfloat16(), head, None), (x, head, bias.double())):
        with pytest.raises(TypeError, match="they must agree"):
            linear_cross_entropy(*layer[:2], target, linear_bias=layer[2])
    for elsewhere in ((x, head.to("meta"), target), (x, head, target.to("meta"))):
        with pytest.raises(ValueError, match="is on meta, input on"):
            linear_cross_entropy(*elsewhere)
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = linear_cross_entropy(x, head.bfloat16(), target, linear_bias=bias)
    # Logits in bf16; measured 0.015 of a loss near 10.
    torch.testing.assert_close(loss, linear_cross_entropy(x, head, target), rtol=2e-2, atol=0)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch < 2.13 has no such class")
@pytest.mark.parametrize("options", [{}, dict(out_features=(3, 2)), dict(weight=torch.rand(33), reduction="sum")])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_the_module_is_torchs(options, kind, backend):
    both = [
        cls(8, 33, bias=True, **options).to(DEVICE)
        for cls in (torch.nn.LinearCrossEntropyLoss, fastllm.nn.LinearCrossEntropyLoss)
    ]
    theirs, mine = both
    assert isinstance(mine, torch.nn.LinearCrossEntropyLoss)
    assert mine.extra_repr().startswith(theirs.extra_repr())
    mine.load_state_dict(theirs.state_dict())
    x, dims = torch.randn(5, 8, device=DEVICE), options.get("out_features", ())
    y = torch.randint(33, (5, *dims), device=DEVICE)
    if kind == "probabilities":
        y = torch.randn(5, 33, *dims, device=DEVICE).softmax(1)
    losses = [module(x, y) for module in both]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
