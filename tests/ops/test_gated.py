"""What is peculiar to the gated activations: the packed form, the ends of the range, traffic, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import backend_fixture

import fastllm
from fastllm import OPS
from fastllm.bench.traffic import measure
from fastllm.functional import geglu, swiglu
from fastllm.registry import Sample

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

backend = backend_fixture("eager", "triton", "native", op="swiglu")

FORMS = [
    (swiglu, {}, F.silu),
    (geglu, {}, F.gelu),
    (geglu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
]


@pytest.mark.parametrize(("function", "options", "act"), FORMS)
def test_the_packed_form_is_the_pair_and_has_one_gradient(backend, function, options, act):
    packed = torch.randn(3, 5, 38, device=DEVICE, requires_grad=True)
    dy = torch.randn(3, 5, 19, device=DEVICE)
    gate, up = (t.detach().clone().requires_grad_() for t in packed.chunk(2, -1))
    y = function(packed, **options)
    (grad,) = torch.autograd.grad(y, packed, dy)
    assert grad.is_contiguous()
    expected = act(gate) * up
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, torch.cat(torch.autograd.grad(expected, (gate, up), dy), -1))


@pytest.mark.parametrize(("function", "options", "act"), FORMS)
def test_far_ends_are_torchs(backend, function, options, act):
    gate = torch.tensor([-1e4, -200.0, -88.0, -9.0, -0.0, 9.0, 88.0, 1e4], device=DEVICE, requires_grad=True)
    up = torch.full((8,), 2.0, device=DEVICE)
    (mine,) = torch.autograd.grad(function(gate, up, **options).sum(), gate)
    expected = act(gate) * up
    torch.testing.assert_close(function(gate, up, **options), expected)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), gate)[0])


def test_modules(backend):
    gate, up = torch.randn(4, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE)
    torch.testing.assert_close(fastllm.nn.SwiGLU()(gate, up), F.silu(gate) * up)
    module = fastllm.nn.GEGLU("tanh")
    assert "tanh" in repr(module)
    torch.testing.assert_close(module(gate, up), F.gelu(gate, approximate="tanh") * up)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_is_moved_once(packed):
    width = 600 if packed else 300
    args = tuple(torch.randn(20, width).bfloat16().requires_grad_() for _ in range(1 if packed else 2))
    measured = measure(OPS["swiglu"], Sample("", args))
    assert measured.forward_ratio == measured.backward_ratio == 1.0, measured.backward.table()


X = torch.zeros(2, 6)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("function", [swiglu, geglu])
@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((X.long(), X), TypeError, "gate.*int64"),
        ((X, 3), TypeError, "up.*int"),
        ((X, X[:1]), ValueError, r"up.*\[2, 6\].*\[1, 6\]"),
        ((X, X.to("meta")), ValueError, "up is on meta"),
        ((X[:, :5],), ValueError, r"even last dimension.*\[2, 5\]"),
        ((X[0, 0],), ValueError, "even last dimension"),
    ],
)
def test_errors_name_what_is_wrong(function, args, error, words):
    with pytest.raises(error, match=f"{function.__name__}: .*{words}"):
        function(*args)
    for call in (lambda: geglu(X, X, approximate="erf"), lambda: fastllm.nn.GEGLU("erf")):
        with pytest.raises(ValueError, match="geglu: approximate must be 'none' or 'tanh', got 'erf'"):
            call()


def test_infinite_gates_are_nan_as_in_torch(backend):
    gate = torch.tensor([-math.inf, math.nan], device=DEVICE)
    assert swiglu(gate, torch.ones(2, device=DEVICE)).isnan().all()
    assert (F.silu(gate)).isnan().all()
