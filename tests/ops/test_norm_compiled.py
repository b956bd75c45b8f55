"""The norms under torch.compile where two arguments are one tensor, or one is a view of another."""

import itertools

import pytest
import torch
from conftest import DEVICE
from thorough import IS_THOROUGH

import fastllm
from fastllm import OPS
from fastllm.backends import why_not

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

ARGUMENTS = {
    "layer_norm": ("input", "weight", "bias"),
    "rms_norm": ("input", "weight"),
    "add_layer_norm": ("input", "residual", "weight", "bias"),
    "add_rms_norm": ("input", "residual", "weight"),
}
# Each compiles. Backends and pairs take turns with the two ways: every pair has both, on some backend.
CASES = [
    pytest.param(op, backend, first, second, way == "view", id=f"{op}-{backend}-{first}-{second}-{way}")
    for op, names in ARGUMENTS.items()
    for i, backend in enumerate(b for b in OPS[op].backends if why_not(b, DEVICE.type, op=OPS[op]) is None)
    for j, (first, second) in enumerate(itertools.combinations(names, 2))
    for k, way in enumerate(("same", "view"))
    if IS_THOROUGH or (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("op", "backend", "first", "second", "view"), CASES)
def test_one_tensor_given_twice(op, backend, first, second, view):
    """Of one dimension, so that any argument may be any other."""

    def call(*tensors):
        given = dict(zip([name for name in ARGUMENTS[op] if name != second], tensors, strict=True))
        given[second] = given[first].view(24) if view else given[first]
        out = OPS[op].function(normalized_shape=(24,), eps=1e-3, **given)
        return out if isinstance(out, tuple) else (out,)

    def run(function):
        outs = function(*tensors)
        return outs, torch.autograd.grad(outs, tensors, [torch.ones_like(o).cumsum(0) for o in outs])

    tensors = [torch.randn(24, device=DEVICE, requires_grad=True) for _ in ARGUMENTS[op][1:]]
    torch._dynamo.reset()
    with fastllm.backend(backend):
        got = run(torch.compile(call, fullgraph=True, backend="aot_eager"))
        torch.testing.assert_close(got, run(call))
    with fastllm.backend("eager"):
        torch.testing.assert_close(got, run(call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_two_arguments_that_are_one_tensor_to_the_caller(op):
    """Dynamo sees two arguments, and finds that they are one."""
    (backend,) = [b for b in ("native", "triton") if why_not(b, DEVICE.type, op=OPS[op]) is None][:1]
    compiled = torch.compile(
        lambda x, residual: OPS[op].function(x, residual, (8,)), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    with fastllm.backend(backend):
        for residual in (x, x.detach().clone(), x):
            got, expected = compiled(x, residual), OPS[op].function(x, residual, (8,))
            torch.testing.assert_close(got, expected)
            grads = [torch.autograd.grad(y.square().sum() + h.square().sum(), x)[0] for y, h in (got, expected)]
            torch.testing.assert_close(*grads)
