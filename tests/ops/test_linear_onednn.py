"""functional.linear, nn.Linear and accelerated layers by oneDNN: numbers, layouts, and who is not given to it."""

import pytest
import torch
import torch.nn.functional as F
from onednn_products import NEEDS_ONEDNN
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm import extension
from fastllm import nn as fast
from fastllm.drop_in import forwards
from fastllm.functional import linear
from fastllm.ops import linear as linear_op
from fastllm.ops.shared import onednn

pytestmark = [
    pytest.mark.runs_on("anywhere"),
    pytest.mark.cpu_level,
    NEEDS_ONEDNN,
]
M, K, N = 700, 48, 96


@pytest.fixture
def calls(monkeypatch):
    """The sizes of oneDNN's products, of which each sum has one part here."""
    monkeypatch.setattr(onednn, "_fewest", lambda: 2**16)
    monkeypatch.setattr(linear_op, "LEAST_WEIGHT", K * N)
    monkeypatch.setattr(onednn, "_faster_for_all", lambda: True)
    monkeypatch.setattr(onednn, "parts_of_sum", lambda length: [slice(0, length)])
    seen, real = [], onednn.multiplied

    def multiplied(x, weight, *bias):
        seen.append((*x.shape, len(weight)))
        return real(x, weight, *bias)

    monkeypatch.setattr(onednn, "multiplied", multiplied)
    seen.clear()
    return seen


def _tensors(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    x, w, b = torch.randn(7, M // 7, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return [t.to(dtype).requires_grad_() for t in (x, w, *([b] if bias else []))]


def _results(function, tensors):
    y = function(*tensors)
    upstream = torch.linspace(0.5, 1, y.numel()).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], upstream)


def _check(function, tensors):
    found = _results(function, tensors)
    for value, wide in zip(
        found, _results(F.linear, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]), strict=True
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wide, rtol=0, atol=2e-6 * wide.abs().max().item())
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_fp64(calls, bias):
    tensors = _tensors(bias)
    found = _check(linear, tensors)
    assert calls == [(M, K, N), (M, N, K), (N, M, K)]
    for tensor, gradient in zip(tensors, found[1:], strict=True):
        assert gradient.stride() == tensor.stride()


def test_parts_of_a_sum_keep_the_rule_for_numbers():
    """The bench's yardstick for one call: twice the error of PyTorch's operator, and four eps."""
    for rows, columns, outputs in ((512, 768, 1024), (1024, 256, 512), (256, 2048, 256)):
        x, w = torch.randn(rows, columns), torch.randn(outputs, columns) / columns**0.5
        wide = x.double() @ w.double().t()
        worst = [(y.double() - wide).abs().max().item() for y in (onednn.onednn_product(x, w), F.linear(x, w))]
        assert worst[0] <= 2 * worst[1] + 4 * torch.finfo(torch.float32).eps
    assert onednn.parts_of_sum(100) == [slice(0, 50), slice(50, 100)]
    assert [s.stop - s.start for s in onednn.parts_of_sum(3072)] == [256] * 12
    assert onednn.parts_of_sum(1) == [slice(0, 1)]


@pytest.mark.parametrize("change", ["transposed weight", "strided weight", "strided input", "expanded upstream"])
def test_strides_are_free(calls, change):
    x, w, b = _tensors()
    if change == "transposed weight":
        w = w.detach().t().contiguous().t().requires_grad_()
    elif change == "strided weight":
        w = torch.randn(N, 2 * K)[:, ::2].requires_grad_()
    elif change == "strided input":
        x = torch.randn(K, 2 * M).t()[::2].requires_grad_()
    else:
        gradients = torch.autograd.grad(linear(x, w, b).sum(), (x, w, b))
        wide = torch.autograd.grad(F.linear(x.double(), w.double(), b.double()).sum(), (x, w, b))
        for value, expected in zip(gradients, wide, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
        assert calls
        return
    found = _check(linear, [x, w, b])
    assert calls
    if change == "transposed weight":
        assert found[2].stride() == w.stride()


def test_frozen_tensors_get_no_product(calls):
    x, w, b = _tensors()
    y = linear(x.detach(), w, b)
    before = len(calls)
    torch.autograd.grad(y.sum(), w)
    assert calls[before:] == [(N, M, K)]
    y = linear(x, w.detach(), b.detach())
    before = len(calls)
    torch.autograd.grad(y.sum(), x)
    assert calls[before:] == [(M, N, K)]


def test_second_order(calls):
    x, w, b = (t.detach().double().float().requires_grad_() for t in _tensors())

    def second(function, x, w, b):
        (dx,) = torch.autograd.grad(function(x, w, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    value = second(linear, x, w, b)
    assert calls
    torch.testing.assert_close(
        value.double(),
        second(F.linear, *(t.detach().double().requires_grad_() for t in (x, w, b))),
        rtol=1e-4,
        atol=1e-2,
    )


def test_compiled_whole(calls):
    tensors = _tensors()
    compiled = torch.compile(lambda *t: linear(*t).relu(), fullgraph=True, backend="aot_eager")
    for value, expected in zip(
        _results(compiled, tensors), _results(lambda *t: F.linear(*t).relu(), tensors), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=5e-5)
    assert calls


def test_a_compiler_does_not_trace_what_this_cpu_is():
    tensors = _tensors()
    product = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(product(*tensors), F.linear(*tensors))


def test_who_looks_at_operators_sees_pytorchs(calls):
    x, w, b = _tensors()
    with FlopCounterMode(display=False) as counter:
        linear(x, w, b).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * M * K * N
    assert not calls


@pytest.mark.skipif(extension.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("rows", [1, 5])
def test_a_few_rows_without_gradients_are_the_extensions(calls, monkeypatch, rows):
    monkeypatch.setattr(linear_op, "MIN_FLOATS", K * N)
    called = []
    real = linear_op.linear_rows
    for module in (linear_op, forwards):
        monkeypatch.setattr(module, "linear_rows", lambda *tensors: called.append(len(tensors)) or real(*tensors))
    _, w, b = (t.detach() for t in _tensors())
    x = torch.randn(rows, K)
    layer = nn.Linear(K, N)
    layer.load_state_dict({"weight": w, "bias": b})
    fastllm.accelerate(nn.Sequential(layer))
    with torch.no_grad():
        for product in (lambda x: linear(x, w, b), layer):
            torch.testing.assert_close(product(x), F.linear(x, w, b), rtol=1e-5, atol=2e-6)
            assert called.pop() == 3
            with FlopCounterMode(display=False) as counter:
                product(x)
            assert counter.get_total_flops() == 2 * rows * K * N
            product(torch.randn(6, K))
    assert linear(x, w.requires_grad_(), b).requires_grad
    assert not called
    assert not calls


def test_eager_is_pytorchs_operator(calls):
    x, w, b = _tensors()
    with fastllm.backend("eager"):
        assert torch.equal(linear(x, w, b), F.linear(x, w, b))
    assert not calls


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch's own jvp
def test_transforms_and_other_tensors_are_pytorchs(calls):
    x, w, b = _tensors()
    torch.testing.assert_close(torch.func.vmap(linear, (0, None, None))(x, w, b), F.linear(x, w, b))
    primal, tangent = torch.func.jvp(lambda x: linear(x, w, b), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(primal, F.linear(x, w, b))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), w))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    linear(*(t.double() for t in (x, w, b)))
    linear(x[0, :4], w, b)
    assert not calls


def test_the_module_and_an_accelerated_layer_are_served(calls):
    x, *_ = _tensors()
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K))
    own = nn.Sequential(fast.Linear(K, N), nn.GELU(), fast.Linear(N, K))
    own.load_state_dict(plain.state_dict())
    want = _results(plain, [x])
    assert not calls
    for value, expected in zip(_results(own, [x]), want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert calls
    calls.clear()
    report = fastllm.accelerate(plain)
    assert "oneDNN" in str(report)
    for value, expected in zip(_results(plain, [x]), want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert calls


def test_layers_are_left_where_pytorchs_product_is_as_fast(monkeypatch):
    monkeypatch.setattr(onednn, "_fewest", lambda: float("inf"))
    model = nn.Sequential(nn.Linear(K, N))
    fastllm.accelerate(model)
    assert model[0].forward.__func__ is nn.Linear.forward


def test_the_number_of_threads_changes_no_bit(calls):
    tensors, before = _tensors(), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_results(linear, tensors))
    finally:
        torch.set_num_threads(before)
    assert calls
    assert all(map(torch.equal, *found))
