"""An argument of the wrong kind is named in the error, and an id out of range by its place in the caller's tensor."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastllm
from fastllm import functional as FF
from fastllm.ops.cross_entropy.loss import row_out_of_range
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("anywhere")

# Options that are only asked whether they are true, as torch asks them.
TRUTH = {
    "causal", "return_lse", "is_causal", "enable_gqa", "size_average", "reduce", "inplace", "recompute",
    "scale_grad_by_freq", "interleaved",
}  # fmt: skip
# torch takes it and has no use for it.
UNREAD = {("linear_cross_entropy", "options")}


class Odd:
    """No number, no tensor, no sequence."""


@pytest.mark.parametrize("name", OPS)
def test_an_argument_of_the_wrong_kind_is_named(name):
    op = OPS[name]
    sample = next(iter(op.samples(torch.device("cpu"), torch.float32)))
    signature = inspect.signature(op.function)
    given = signature.bind(*sample.args, **sample.kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.name in TRUTH or (name, parameter.name) in UNREAD:
            continue
        for value in (Odd(), "x", [object()]):
            bound = inspect.BoundArguments(signature, dict(given))
            bound.arguments[parameter.name] = value
            bound.apply_defaults()
            with pytest.raises((TypeError, ValueError)) as raised:
                op.function(*bound.args, **bound.kwargs)
            assert parameter.name in str(raised.value), (parameter.name, value, raised.value)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4)])
def test_a_bad_target_is_named_by_its_place(backend, shape):
    target = torch.ones(shape, dtype=torch.int64)
    last = tuple(size - 1 for size in shape)
    target[last] = 7
    place = rf"target 7 at position \[{', '.join(map(str, last))}\] is out" if shape else "target 7 is out"
    x, w = torch.randn(*shape, 3), torch.randn(5, 3)
    logits = torch.randn(*shape, 5) if len(shape) < 2 else torch.randn(*shape, 5).movedim(-1, 1)
    with fastllm.backend(backend):
        with pytest.raises(IndexError, match=f"^cross_entropy: {place}"):
            FF.cross_entropy(logits, target)
        for op in (FF.linear_cross_entropy, FF.linear_log_probs):
            with pytest.raises(IndexError, match=f"^{op.__name__}: {place}"):
                op(x, w, target)
            if shape:
                # Bad targets before it are no input's.
                unread = target.clone()
                unread[..., 0] = 9
                with pytest.raises(IndexError, match=f"^{op.__name__}: {place}"):
                    op(x, w, unread, shift=1)


def test_where_the_targets_shape_is_lost_a_bad_target_is_named_by_its_row():
    target = torch.tensor([[1, -100, 2], [0, 1, 7]])
    error = row_out_of_range(target, -100, 5, "linear_cross_entropy")
    assert str(error).startswith("linear_cross_entropy: target 7 of row 5 of the logits is out of range")
    assert row_out_of_range(target, 7, 5, "linear_cross_entropy") is not None
    assert row_out_of_range(target.clamp(max=4), -100, 5, "linear_cross_entropy") is None


# torch's own operators take these, or say why not.
TORCHS_OWN = {("linear", "sparse"), ("swiglu", "sparse"), ("geglu", "sparse")}


def _odd_tensors(tensor):
    """(kind, tensor) of layouts and dtypes that no kernel computes in."""
    plain = tensor.detach()
    yield "sparse", plain.to_sparse()
    yield "complex", plain.to(torch.complex64)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", OPS)
def test_a_tensor_of_an_odd_layout_or_dtype_is_named(name, backend):
    op = OPS[name]
    signature = inspect.signature(op.function)
    tried = 0
    for sample in list(op.samples(torch.device("cpu"), torch.float32))[:6]:
        given = signature.bind(*sample.args, **sample.kwargs).arguments
        for parameter, value in given.items():
            if not isinstance(value, torch.Tensor) or (name, parameter) == ("embedding", "weight"):
                continue
            for kind, odd in _odd_tensors(value):
                if (name, kind) in TORCHS_OWN:
                    continue
                bound = inspect.BoundArguments(signature, given | {parameter: odd})
                with fastllm.backend(backend), pytest.raises((TypeError, ValueError), match=parameter) as raised:
                    op.function(*bound.args, **bound.kwargs)
                assert name in str(raised.value)
                tried += 1
    assert tried or name == "embedding_sum"


@pytest.mark.parametrize(
    "op", [FF.swiglu, FF.layer_norm, FF.attention, FF.linear, FF.rotary_embedding, FF.embedding_sum]
)
def test_eight_bits_are_no_floating_point_to_compute_in(op):
    sample = next(iter(OPS[op.__name__].samples(torch.device("cpu"), torch.float32)))
    narrow = torch.float8_e4m3fn
    first, *rest = sample.args
    if op is FF.embedding_sum:
        rest = [[table.detach().to(narrow) for table in rest[0]]]
    else:
        first = first.detach().to(narrow)
    with pytest.raises(TypeError, match=f"{op.__name__}: .* must be a floating-point tensor, got torch.float8_e4m3fn"):
        op(first, *rest, **sample.kwargs)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "linear_log_probs", "linear_kl_div"])
def test_numbers_that_no_kernel_can_take_are_named(name):
    op = OPS[name]
    sample = next(iter(op.samples(torch.device("cpu"), torch.float32)))
    known = inspect.signature(op.function).parameters
    for backend in ("auto", "eager"):
        for parameter, value in (
            ("ignore_index", 10**30), ("shift", 10**30), ("max_targets", 10**30), ("max_workspace_mb", torch.inf),
            ("ignore_index", True), ("shift", True), ("max_targets", False),
        ):  # fmt: skip
            if parameter in known:
                with fastllm.backend(backend), pytest.raises((TypeError, ValueError), match=f"^{name}: {parameter}"):
                    op.function(*sample.args, **{**sample.kwargs, parameter: value})


X, W, T = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
WRONG = {
    "layer_norm: eps must fit in a float, got an integer of 2001 bits": lambda: FF.layer_norm(X, (4,), eps=2**2000),
    "linear_log_probs: temperature must be": lambda: FF.linear_log_probs(X, W, T, temperature=2**2000),
    "cross_entropy: reduction must be one of": lambda: FF.cross_entropy(X, T, reduction=["mean"]),
    "linear_kl_div: direction must be one of": lambda: FF.linear_kl_div(X, W, X, W, direction=["jsd"]),
    "embedding: vocab_range must be an integer, got 0.5": lambda: FF.embedding(T, W, vocab_range=(0.5, 5.5)),
    "embedding: vocab_range must be an integer of 64": lambda: FF.embedding(T, W, vocab_range=(2**63, 2**63 + 5)),
    "embedding: vocab_range must be an integer, got None": lambda: FF.embedding(T, W, vocab_range=(None, 5)),
    "linear_cross_entropy: linear_bias must be a floating-point tensor, got list": lambda: FF.linear_cross_entropy(
        X, W, torch.ones(3, 5), linear_bias=[0.0] * 5
    ),
    "linear_cross_entropy_plan: input must be a floating-point tensor, got str": lambda: FF.linear_cross_entropy_plan(
        "x", W
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_options_out_of_range_are_named(message):
    with pytest.raises((TypeError, ValueError)) as raised:
        WRONG[message]()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_one_row_of_logits_takes_its_target_in_either_shape(backend):
    """torch takes both, but not with label smoothing; every option takes both here."""
    x, target = torch.linspace(-1, 1, 5), torch.tensor([2])
    with fastllm.backend(backend):
        for options in ({}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"z_loss": 0.1}, {"weight": X.new_ones(5)}):
            got = FF.cross_entropy(x, target, reduction="none", **options)
            assert torch.equal(got, FF.cross_entropy(x, target[0], reduction="none", **options))


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_targets_of_8_bits_are_class_indices_like_any(backend):
    """-100 modulo 256 is class 156, and a tensor of 8 bits that indexes is a mask."""
    torch.manual_seed(0)
    target = torch.tensor([156, 3, 200, 255, 99, 0], dtype=torch.uint8)
    logits, hidden, layer = torch.randn(6, 256), torch.randn(6, 16), torch.randn(256, 16)
    weight = torch.rand(256)
    options = [{}, {"z_loss": 0.1}, {"weight": weight, "z_loss": 0.1}, {"label_smoothing": 0.1}, {"ignore_index": 200}]
    with fastllm.backend(backend):
        for how in options:
            assert torch.equal(FF.cross_entropy(logits, target, **how), FF.cross_entropy(logits, target.long(), **how))
            of_layer = (FF.linear_cross_entropy(hidden, layer, t, **how) for t in (target, target.long()))
            assert torch.equal(*of_layer), how
        for how in ({}, {"ignore_index": 200}):
            found = [FF.linear_kl_div(hidden, layer, logits, target=t, **how) for t in (target, target.long())]
            assert torch.equal(*found), how
            assert torch.equal(*(FF.linear_log_probs(hidden, layer, t, **how) for t in (target, target.long())))
        with pytest.raises(IndexError, match=r"target 156 at position \[0\]"):
            FF.cross_entropy(logits[:, :100], target)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_torchs_operators(layout):
    torch.manual_seed(0)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    weight, bias, table = torch.randn(9, 8), torch.randn(9), torch.randn(10, 8)
    pairs = [
        (FF.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)),
        (FF.swiglu(x, x), torch.nn.functional.silu(x) * x),
        (FF.layer_norm(x, (8,), *weight[:2]), torch.nn.functional.layer_norm(x, (8,), *weight[:2])),
    ]
    if layout == torch.jagged:
        ids = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], layout=layout)
        pairs.append((FF.embedding(ids, table), torch.nn.functional.embedding(ids, table)))
        pairs.append((FF.add_layer_norm(x, x, (8,))[0], torch.nn.functional.layer_norm(x + x, (8,))))
    for ours, theirs in pairs:
        assert ours.is_nested
        assert all(map(torch.equal, ours.unbind(), theirs.unbind()))
    with pytest.raises(TypeError, match=r"^cross_entropy: input must be a dense tensor, got one that is nested"):
        FF.cross_entropy(x, torch.ones(8, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_bias_alone_beside_16_bits(dtype):
    """torch takes float32 parameters beside such rows, but no bias without a weight."""
    x, bias = torch.randn(4, 8).to(dtype), torch.randn(8)
    with fastllm.backend("eager"):
        expected = torch.nn.functional.layer_norm(x.float(), (8,), None, bias).to(dtype)
        assert torch.equal(FF.layer_norm(x, (8,), None, bias), expected)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_float64_rows_beside_float32_parameters(backend):
    x, weight, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(8), torch.randn(8)
    with fastllm.backend(backend):
        expected = torch.nn.functional.layer_norm(x, (8,), weight.double(), bias.double())
        torch.testing.assert_close(FF.layer_norm(x, (8,), weight, bias), expected)
        normed, total = FF.add_layer_norm(torch.zeros(4, 8), x, (8,), weight, bias)
        torch.testing.assert_close(normed, expected.float())
        assert torch.equal(total, x)
