"""One tensor in two places of a call, under fullgraph=True: the gradients are the sums of both."""

import pytest
import torch
from conftest import DEVICE

import fastllm
from fastllm.functional import cross_entropy, linear_cross_entropy

Y = torch.tensor([1, 7, -100, 3, 0, 2, 6, 5], device=DEVICE)

# Name -> a function of one square matrix, which it gives to the op in several places.
CALLS = {
    "input_is_weight": lambda s: linear_cross_entropy(s, s, Y),
    "weight_is_a_view": lambda s: linear_cross_entropy(s, s.view(8, 8), Y),
    "weight_is_transposed": lambda s: linear_cross_entropy(s, s.t(), Y),
    "bias_is_a_row": lambda s: linear_cross_entropy(s, s, Y, linear_bias=s[0]),
    "weight_twice": lambda s: linear_cross_entropy(s[:3], s, Y[:3]) + linear_cross_entropy(s[3:], s, Y[3:]),
    "one_vector_of_weights": lambda s: linear_cross_entropy(s, s, Y, weight=ONES, token_weight=ONES),
    "probabilities_are_logits": lambda s: cross_entropy(s, s),
    "probabilities_are_a_view": lambda s: cross_entropy(s, s.view(8, 8)),
    "all_three": lambda s: linear_cross_entropy(s, s, s),
}
ONES = torch.linspace(0.5, 1.5, 8, device=DEVICE)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("backend", ["eager", "triton", "native"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_separate_tensors(name, backend, dynamic):
    reason = fastllm.backends.why_not(backend, DEVICE.type, op=fastllm.registry.OPS["cross_entropy"])
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    square = torch.randn(8, 8, device=DEVICE, requires_grad=True)
    truth = square.detach().double().requires_grad_()
    with fastllm.backend("eager"):
        (expected,) = torch.autograd.grad(CALLS[name](truth), truth)
    with fastllm.backend(backend):
        compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(square), square)
        (plain,) = torch.autograd.grad(CALLS[name](square), square)
    for gradient in (got, plain):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
