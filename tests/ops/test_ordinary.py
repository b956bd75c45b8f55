"""Calls whose backend is known at once: the same bits as by all checks and ``pick``, without either."""

import importlib

import pytest
import torch
from contract import copy, leaves, outputs

import fastllm
from fastllm import OPS, backends
from fastllm.extension import load as extension
from fastllm.registry import Sample

CPU = torch.device("cpu")
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "swiglu", "geglu", "linear")
MODULES = {
    "layer_norm": "norm.layer_norm", "rms_norm": "norm.rms_norm", "add_layer_norm": "norm.add_norm",
    "add_rms_norm": "norm.add_norm", "swiglu": "gated", "geglu": "gated", "linear": "linear",
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
