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
NAMES = (
    "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "swiglu", "geglu", "linear", "cross_entropy",
    "linear_cross_entropy", "linear_log_probs", "embedding", "embedding_sum", "attention",
    "scaled_dot_product_attention",
)  # fmt: skip
LAYERS = ("linear", "linear_cross_entropy", "linear_log_probs")
MODULES = {
    "layer_norm": "norm.layer_norm", "rms_norm": "norm.rms_norm", "add_layer_norm": "norm.add_norm",
    "add_rms_norm": "norm.add_norm", "swiglu": "gated", "geglu": "gated", "linear": "linear",
    "cross_entropy": "cross_entropy.cross_entropy", "linear_cross_entropy": "cross_entropy.linear",
    "linear_log_probs": "cross_entropy.linear", "embedding": "embedding.embedding",
    "embedding_sum": "embedding.embedding_sum", "attention": "attention.attention",
    "scaled_dot_product_attention": "attention.sdpa",
}  # fmt: skip

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler")


def _results(op, sample):
    """Outputs and gradients, for gradients that the outputs' shapes fix."""
    sample = copy(sample)
    found = outputs(op.function(*sample.args, **sample.kwargs))
    wanted = leaves(sample)
    graph = [y for y in found if y.requires_grad]
    upstream = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in graph]
    return *found, *torch.autograd.grad(graph, wanted, upstream)


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
    if name in ("linear_cross_entropy", "linear_log_probs"):
        x, weight, reductions = torch.randn(70, 24), torch.randn(31, 24), ("none", "mean", "sum")
        for ignored in (0, 1, 40):  # few are ignored, or many
            target = torch.arange(70) % 31
            target[:ignored] = -100
            for options in [{"reduction": r} for r in reductions] if name == "linear_cross_entropy" else [{}]:
                for frozen in (None, 0, 1):
                    layer = [t.to(dtype).requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
                    yield Sample(f"{ignored} ignored {options} {frozen}", (*layer, target), options)
    if name in ("attention", "scaled_dot_product_attention"):
        causal = "causal" if name == "attention" else "is_causal"
        for rows in (1, 5, 64):
            heads = [torch.randn(2, 3, rows, 16).to(dtype).requires_grad_() for _ in range(3)]
            for scale in (None, 0.3, -0.3, 0.0, 1e-45):
                yield Sample(f"{rows} rows, {scale}", tuple(heads), {causal: True, "scale": scale})
            yield Sample(f"all of {rows} rows", tuple(heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_by_all_checks(name, dtype):
    seen = []
    for sample in _all_of(name, dtype):
        at_once = _results(OPS[name], sample)
        with backends.observed(lambda op, choice: seen.append(choice)):
            by_pick = _results(OPS[name], sample)
        for a, b in zip(at_once, by_pick, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{name}/{sample.name}")
    assert seen, "an observer sees every choice"


# Attention without gradients is served by other forms, which keep no statistics.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in NAMES if "attention" not in name])
def test_a_call_without_gradients_has_the_bits_of_one_with(name, dtype):
    for sample in _all_of(name, dtype):
        function = OPS[name].function
        expected = outputs(function(*sample.args, **sample.kwargs))
        with torch.no_grad():
            got = outputs(function(*sample.args, **sample.kwargs))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=0, equal_nan=True, msg=f"{name}/{sample.name}")


def _ordinary(name, dtype):
    def made(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    if name == "linear":
        return Sample("", (made(2, 3, 32), made(8, 32), made(8)))
    if name in ("swiglu", "geglu"):
        return Sample("", (made(2, 3, 1024), made(2, 3, 1024)))
    if name == "cross_entropy":
        return Sample("", (made(6, 32), torch.arange(6)))
    if name in LAYERS:
        return Sample("", (made(6, 32), made(8, 32), torch.arange(6)))
    if name == "embedding":
        return Sample("", (torch.tensor([[3, 0], [3, 7]]), made(8, 32)), {"padding_idx": -1})
    if name == "embedding_sum":
        return Sample("", ([torch.tensor([[3, 0], [3, 7]]), torch.arange(2)], [made(8, 32), made(4, 32)]))
    if name in ("attention", "scaled_dot_product_attention"):
        return Sample("", tuple(made(1, 2, 5, 16) for _ in range(3)))
    parameters = {"weight": made(32)} | ({"bias": made(32)} if "layer" in name else {})
    return Sample("", (*(made(2, 3, 32) for _ in range(1 + name.startswith("add"))), (32,)), parameters)


# Attention in 16 bits has several forms, so pick decides.
NOT_PICKED = [(name, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)
              if dtype == torch.float32 or "attention" not in name]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), NOT_PICKED)
def test_an_ordinary_call_is_not_picked(name, dtype, monkeypatch):
    if name in LAYERS and not fastllm.cpu.multiplies(dtype):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_halves_of_one_tensor_are_not_picked(name, dtype, monkeypatch):
    def refused(*args):
        raise AssertionError("the choice was known")

    monkeypatch.setattr(importlib.import_module("fastllm.ops.gated"), "pick", refused)
    packed = Sample("", (torch.randn(2, 3, 64).to(dtype).requires_grad_(),))
    pair = Sample("", tuple(packed.args[0].detach().chunk(2, -1)))
    assert torch.equal(_results(OPS[name], packed)[0], OPS[name].function(*pair.args))
    with torch.no_grad():
        OPS[name].function(*packed.args)
    with pytest.raises(ValueError, match="even last dimension"):
        OPS[name].function(torch.randn(2, 3))
    with pytest.raises(ValueError, match="even last dimension"):
        OPS[name].function(torch.randn(()))


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


LINEAR = [("linear_cross_entropy", r) for r in ("mean", "sum", "none")] + [("linear_log_probs", None)]


@pytest.mark.parametrize(("name", "reduction"), LINEAR)
def test_a_linear_losss_second_backward_and_its_gradients_gradient(name, reduction):
    x, weight, target = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True), torch.arange(6)
    options = {} if reduction is None else {"reduction": reduction}
    y = OPS[name].function(x, weight, target, **options)
    upstream, layer = torch.rand_like(y), (x, weight)
    first = torch.autograd.grad(y, layer, upstream, retain_graph=True)
    second = torch.autograd.grad(y, layer, upstream, create_graph=True)
    wide = [t.detach().double().requires_grad_() for t in layer]
    expected = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, target, reduction=reduction or "none")
    expected = expected if reduction else -expected
    torch.testing.assert_close(y, expected.float())
    expected = torch.autograd.grad(expected, wide, upstream.double(), create_graph=True)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(b, c.float())
    again = torch.autograd.grad(sum(t.square().sum() for t in second), layer)
    expected = torch.autograd.grad(sum(t.square().sum() for t in expected), wide)
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b.float())


@pytest.mark.parametrize("target", [[0, 32, 2], [0, -1, 2], [0, 1], [[0], [1], [2]]])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_probs"])
def test_a_linear_losss_errors_are_those_of_all_checks(name, target):
    call = torch.randn(3, 8, requires_grad=True), torch.randn(32, 8), torch.tensor(target)
    with pytest.raises((ValueError, IndexError)) as at_once:
        OPS[name].function(*call)
    with backends.observed(lambda op, choice: None), pytest.raises(at_once.type) as by_pick:
        OPS[name].function(*call)
    assert str(at_once.value) == str(by_pick.value)


@pytest.mark.parametrize(
    ("ids", "padding"), [([0, 8], None), ([0, -1], None), ([0, 1], 8), ([0, 1], -9), ([0, 1], 0.5), ([0.0, 1.0], None)]
)
def test_embeddings_errors_are_those_of_all_checks(ids, padding):
    call = torch.tensor(ids), torch.randn(8, 4, requires_grad=True), padding
    with pytest.raises((ValueError, TypeError, IndexError)) as at_once:
        fastllm.functional.embedding(*call)
    with backends.observed(lambda op, choice: None), pytest.raises(at_once.type) as by_pick:
        fastllm.functional.embedding(*call)
    assert str(at_once.value) == str(by_pick.value)


def test_embeddings_gradients_are_differentiable_and_batched():
    ids, table = torch.tensor([[3, 0], [3, 7]]), torch.randn(8, 4, requires_grad=True)
    places = torch.arange(2)
    for function in (
        lambda table: fastllm.functional.embedding(ids, table, 7),
        lambda table: fastllm.functional.embedding_sum([ids, places], [table, table]),
    ):
        y = function(table)
        upstream = torch.rand_like(y, requires_grad=True)
        (dtable,) = torch.autograd.grad(y, table, upstream, create_graph=True)
        (found,) = torch.autograd.grad(dtable.square().sum(), upstream)
        with backends.observed(lambda op, choice: None):
            z = function(table)
        (expected,) = torch.autograd.grad(z, table, upstream, create_graph=True)
        assert torch.equal(dtable, expected)
        assert torch.equal(found, torch.autograd.grad(expected.square().sum(), upstream)[0])
        several = torch.rand(3, *y.shape)
        (batched,) = torch.autograd.grad(function(table), table, several, is_grads_batched=True)
        for one, upstream in zip(batched, several, strict=True):
            torch.testing.assert_close(one, torch.autograd.grad(function(table), table, upstream)[0])


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
