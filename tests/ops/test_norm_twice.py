"""The gradient of a norm's gradient where PyTorch's operator serves the call, with each choice of parameters."""

import pytest
import torch

import fastllm
from fastllm.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm

CALLS = [(norm, names) for norm in (rms_norm, add_rms_norm) for names in ((), ("weight",))] + [
    (norm, names) for norm in (layer_norm, add_layer_norm) for names in ((), ("weight",), ("bias",), ("weight", "bias"))
]


@pytest.mark.parametrize(("norm", "parameters"), CALLS)
def test_the_gradient_of_the_gradient_of_every_parameter(norm, parameters):
    torch.manual_seed(0)
    rows = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(1 + ("add" in norm.__name__))]
    given = {name: torch.randn(5, dtype=torch.float64, requires_grad=True) for name in parameters}

    def call(*tensors):
        named = dict(zip(given, tensors[len(rows) :], strict=True))
        return norm(*tensors[: len(rows)], (5,), **named)

    with fastllm.backend("eager"):
        assert torch.autograd.gradgradcheck(call, (*rows, *given.values()))
