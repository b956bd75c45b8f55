"""Calls whose backend is known at once: the same bits as by all checks and ``pick``, without either."""

import importlib

import pytest
import torch
from contract import copy, leaves, outputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm
from fastllm import OPS, backends
from fastllm.extension import load as extension
from fastllm.registry import Sample

CPU = torch.device("cpu")
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "swiglu", "geglu", "linear", "cross_entropy")
MODULES = {
    "layer_norm": "norm.layer_norm", "rms_norm": "norm.rms_norm", "add_layer_norm": "norm.add_norm",
    "add_rms_norm": "norm.add_norm", "swiglu": "gated", "geglu": "gated", "linear": "linear",
    "cross_entropy": "cross_entropy.cross_entropy",
}  # fmt: skip

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler")


def _results(op, sample):
    """Outputs and gradients, for gradients that the outputs' shapes fix."""
    sample = copy(sample)
    found = outputs(op.function(*sample.args, **sample.kwargs))
    wanted = leaves(sample)
    upstream = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in found]
    return *found, *torch.autograd.grad(found, wanted, upstream)


def _all_of(name, dtype):
    for sample in OPS[name].samples(CPU, dtype):
        if sample.kwargs.get("dropout_p", 0.0) == 0.0:
            yield sample
    long = [torch.randn(3, 1500).to(dtype).requires_grad_() for _ in range(2)]
    if name in ("swiglu", "geglu"):
        yield Sample("long rows", tuple(long))
    if name == "cross_entropy":
        for reduction in ("none", "mean", "sum"):
            for target in ([4, 0, 1499], [4, -100, 2], [-100, -100, -100]):
                x = long[0].detach()
                x[1, 7:] = -torch.inf
                yield Sample(reduction, (x.requires_grad_(), torch.tensor(target)), {"reduction": reduction})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_by_all_checks(name, dtype):
    seen = []
    for sample in _all_of(name, dtype):
        at_once = _results(OPS[name], sample)
        with backends.observed(lambda op, choice: seen.append(choice)):
            by_pick = _results(OPS[name], sample)
        for a, b in zip(at_once, by_pick, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), f"{name}/{sample.name}"
    assert seen, "an observer sees every choice"


def _ordinary(name, dtype):
    def made(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    if name == "linear":
        return Sample("", (made(2, 3, 32), made(8, 32), made(8)))
    if name in ("swiglu", "geglu"):
        return Sample("", (made(2, 3, 1024), made(2, 3, 1024)))
    if name == "cross_entropy":
        return Sample("", (made(6, 32), torch.arange(6)))
    parameters = {"weight": made(32)} | ({"bias": made(32)} if "layer" in name else {})
    return Sample("", (*(made(2, 3, 32) for _ in range(1 + name.startswith("add"))), (32,)), parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_an_ordinary_call_is_not_picked(name, dtype, monkeypatch):
    if name == "linear" and not fastllm.cpu.multiplies(dtype):
        pytest.skip(f"this CPU has no products of {dtype}")

    def refused(*args):
        raise AssertionError("the choice was known")

    monkeypatch.setattr(importlib.import_module(f"fastllm.ops.{MODULES[name]}"), "pick", refused)
    sample = _ordinary(name, dtype)
    _results(OPS[name], sample)
    with torch.no_grad():
        OPS[name].function(*sample.args, **sample.kwargs)
    with pytest.raises(AssertionError), fastllm.backend("triton"):
        OPS[name].function(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "swiglu"])
def test_a_gradient_of_the_gradient_is_that_of_pytorchs_operators(name):
    op, sample = OPS[name], copy(_ordinary(name, torch.float32))
    wide = copy(sample, torch.float64)
    found = []
    for each in (sample, wide):
        narrow = [t.to(torch.bfloat16) if isinstance(t, torch.Tensor) and each is sample else t for t in each.args]
        options = {
            k: t.to(torch.bfloat16) if isinstance(t, torch.Tensor) and each is sample else t
            for k, t in each.kwargs.items()
        }
        y = outputs(op.function(*narrow, **options))
        (dx,) = torch.autograd.grad(sum((t.double() ** 2).sum() for t in y), each.args[0], create_graph=True)
        found += torch.autograd.grad((dx.double() ** 2).sum(), each.args[0])
    # At most 1.3% of the largest on a CPU: the inputs, the outputs and both gradients are rounded to bfloat16.
    bound = 4 * torch.finfo(torch.bfloat16).eps * found[1].abs().max().item()
    torch.testing.assert_close(found[0].double(), found[1], rtol=0, atol=bound)


def _logits():
    return torch.randn(6, 32).requires_grad_(), torch.arange(6) * 5


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropys_second_backward_and_its_gradients_gradient(reduction):
    x, target = _logits()
    y = fastllm.functional.cross_entropy(x, target, reduction=reduction)
    upstream = torch.rand_like(y)
    (first,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    assert torch.equal(first, second)
    (again,) = torch.autograd.grad(second.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, target, reduction=reduction)
    (expected,) = torch.autograd.grad(expected, wide, upstream.double(), create_graph=True)
    torch.testing.assert_close(second.double(), expected)
    (expected,) = torch.autograd.grad(expected.square().sum(), wide)
    torch.testing.assert_close(again.double(), expected)


def test_cross_entropys_batched_gradients():
    x, target = _logits()
    y = fastllm.functional.cross_entropy(x, target, reduction="none")
    (found,) = torch.autograd.grad(y, x, torch.eye(6), is_grads_batched=True)
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.nn.functional.cross_entropy(x, target, reduction="none"), x
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ([0, 1, 2, 3, 4, 32], {}),
        ([0, 1, -1, 3, 4, 5], {}),
        ([0, -100, 2, 3, 4, 5], {"ignore_index": 7}),
        ([0, 1, 2, 3, 4], {}),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], {}),
        ([0, 1, 2, 3, 4, 5], {"reduction": "all"}),
        ([0, 1, 2, 3, 4, 5], {"ignore_index": 0.5}),
        ([0, 1, 2, 3, 4, 5], {"label_smoothing": "0"}),
    ],
)
def test_cross_entropys_errors_are_those_of_all_checks(target, options):
    x, target = _logits()[0], torch.tensor(target)
    found = []
    for _ in range(2):
        with pytest.raises((ValueError, TypeError, IndexError)) as error:
            fastllm.functional.cross_entropy(x, target, **options)
        found.append((error.type, str(error.value)))
        with pytest.raises(error.type), torch.no_grad():
            fastllm.functional.cross_entropy(x, target, **options)
        with backends.observed(lambda op, choice: None), pytest.raises(error.type) as by_pick:
            fastllm.functional.cross_entropy(x, target, **options)
        assert found[-1] == (by_pick.type, str(by_pick.value))


def test_cross_entropy_of_logits_that_were_written_to_raises():
    leaf, target = _logits()
    x = leaf * 2
    y = fastllm.functional.cross_entropy(x, target)
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_cross_entropy_where_somebody_looks_at_operators():
    x, target = _logits()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        fastllm.functional.cross_entropy(x, target)
    assert "fastllm.cross_entropy_fwd.default" in seen, "the operator that has a formula for tools, not the extension's"
    graph = make_fx(lambda x, target: fastllm.functional.cross_entropy(x, target))(x.detach(), target)
    assert "cross_entropy_fwd" in graph.code
    with FakeTensorMode() as mode:
        fake = fastllm.functional.cross_entropy(mode.from_tensor(x), mode.from_tensor(target))
    assert fake.shape == ()
    assert fake.dtype == torch.float32


def test_cross_entropy_under_autocast_is_float32():
    x, target = _logits()
    with torch.autocast("cpu", torch.bfloat16):
        y = fastllm.functional.cross_entropy(x.bfloat16(), target)
    assert y.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch's own jvp
def test_cross_entropy_under_transforms():
    x, target = _logits()
    x = x.detach()
    for function in (torch.func.grad, torch.func.jacfwd):
        found = function(fastllm.functional.cross_entropy)(x, target)
        torch.testing.assert_close(found, function(torch.nn.functional.cross_entropy)(x, target))
    found = torch.vmap(fastllm.functional.cross_entropy)(torch.stack([x, x + 1]), torch.stack([target, target]))
    assert found.shape == (2,)
    compiled = torch.compile(fastllm.functional.cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), fastllm.functional.cross_entropy(x, target))
