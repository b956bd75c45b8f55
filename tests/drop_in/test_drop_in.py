"""accelerate(), revert() and their report, on torch's own modules; accelerated()."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from lookalikes import Bigrams, Lookalike
from torch import nn

import fastllm
from fastllm.drop_in import mode


def test_torch_modules_are_swapped_and_give_the_same():
    model = nn.Sequential(nn.Embedding(20, 16), nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16, bias=False))
    other = copy.deepcopy(model)
    keys = list(model.state_dict())
    classes = [type(m) for m in model]
    report = fastllm.accelerate(model)
    assert [e.by for e in report.swapped] == ["embedding", "layer_norm", "rms_norm", "layer_norm"]
    assert report.left == []
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) and type(m).__name__ == cls.__name__ for m, cls in zip(model, classes, strict=True))
    assert [type(m) for m in other] == classes
    ids = torch.randint(20, (3, 5))
    got, want = model(ids), other(ids)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert fastllm.revert(model) == 4
    assert [type(m) for m in model] == classes
    assert torch.equal(model(ids), want)
    assert fastllm.revert(model) == 0


def test_the_root_itself_may_be_the_module():
    norm = nn.LayerNorm(8)
    assert fastllm.accelerate(norm).swapped[0].path == ""
    assert type(norm) is not nn.LayerNorm
    fastllm.revert(norm)
    assert type(norm) is nn.LayerNorm


def test_verify_off_leaves_lookalikes():
    model = nn.Sequential(Lookalike(8), nn.LayerNorm(8))
    report = fastllm.accelerate(model, verify=False)
    assert [e.path for e in report.swapped] == ["1"]
    assert "once it is measured" in report.left[0].why


class Subclassed(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Inherited(nn.LayerNorm):
    pass


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


def test_subclasses_go_by_their_forward():
    model = nn.ModuleList([Subclassed(8), Inherited(8), Scaled(4, 8)])
    report = fastllm.accelerate(model)
    assert [e.path for e in report.swapped] == ["1"]
    assert ["RMS or layer norm" in report.left[0].why, "forward of its own" in report.left[1].why] == [True, True]


def test_a_layer_whose_outputs_its_neighbour_takes_is_no_head():
    """The first layer of an MLP may be as wide as a vocabulary: 4 x 16 columns and 64 characters."""
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model = nn.ModuleDict({"tokens": nn.Embedding(64, 16), "layer": layer, "head": nn.Linear(16, 64)})
    report = fastllm.accelerate(model)
    assert [e.path for e in report.swapped if e.by == "linear_cross_entropy"] == ["head"]
    assert "layer.linear1" not in {e.path for e in report.left}


def test_a_layer_with_fewer_outputs_than_inputs_is_no_head():
    model = nn.ModuleDict({"tokens": nn.Embedding(16, 64), "last": nn.Linear(64, 16)})
    assert [entry.path for entry in fastllm.accelerate(model).swapped] == ["tokens"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_instances_that_cannot_be_swapped_say_why():
    patched = nn.LayerNorm(8)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"patched": patched, "scripted": torch.jit.trace(nn.LayerNorm(8), torch.randn(2, 8))})
    report = fastllm.accelerate(model)
    assert report.swapped == []
    assert {e.path: e.why for e in report.left}["patched"] == "this instance's forward has been replaced already"
    assert torch.equal(model["patched"](torch.ones(8)), torch.ones(8))


def test_shared_modules_hooks_buffers_and_modes_stay():
    norm = nn.LayerNorm(8)
    model = nn.ModuleList([norm, nn.Sequential(norm, nn.Dropout())]).eval()
    model.register_buffer("count", torch.tensor(3))
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    norm.weight.requires_grad_(False)
    weight = norm.weight
    report = fastllm.accelerate(model)
    assert [e.path for e in report.swapped] == ["0"]
    assert model[0] is model[1][0]
    assert model[0].weight is weight
    assert not weight.requires_grad
    assert not model[0].training
    y = model[0](torch.randn(2, 8))
    assert seen[0] is y
    fastllm.revert(model)
    assert model[0] is model[1][0] is norm


def test_copies_and_pickles_are_accelerated_and_can_be_reverted():
    model = nn.Sequential(nn.LayerNorm(8), Lookalike(8), nn.MultiheadAttention(8, 2))
    x = torch.randn(3, 8)
    want = model[1](model[0](x))
    fastllm.accelerate(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again] == [type(m) for m in model]
        assert again[0].weight is not model[0].weight
        torch.testing.assert_close(again[1](again[0](x)), want)
        assert fastllm.revert(again) == 3
        assert [type(m) for m in again] == [nn.LayerNorm, Lookalike, nn.MultiheadAttention]
        assert torch.equal(again[1](again[0](x)), want)
    assert fastllm.revert(model) == 3


def test_twice_is_once():
    model = nn.Sequential(nn.LayerNorm(8))
    fastllm.accelerate(model)
    cls = type(model[0])
    report = fastllm.accelerate(model)
    assert report.swapped == []
    assert report.left[0].why == "it is accelerated already"
    assert type(model[0]) is cls


def test_only_and_skip():
    def build():
        return nn.ModuleDict({"a": nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4)), "b": nn.LayerNorm(4)})

    def swapped(**options):
        return [e.path for e in fastllm.accelerate(build(), **options).swapped]

    assert swapped(only="layer_norm") == ["a.0", "b"]
    assert swapped(only="a") == ["a.0", "a.1"]
    assert swapped(only=["a.*"], skip=nn.RMSNorm) == ["a.0"]
    assert swapped(skip=["rms_norm", "b"]) == ["a.0"]
    assert swapped(dry_run=True) == ["a.0", "a.1", "b"]
    model = build()
    fastllm.accelerate(model, dry_run=True)
    assert type(model["b"]) is nn.LayerNorm
    with pytest.raises(ValueError, match=r"only='rms' is neither an op .* nor a module's path"):
        swapped(only="rms")
    with pytest.raises(TypeError, match="skip takes op names"):
        swapped(skip=[3])
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        fastllm.accelerate({})
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        fastllm.revert(3)


def test_the_report_reads_and_estimates():
    model = nn.ModuleDict({"tokens": nn.Embedding(64, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 64)})
    report = fastllm.accelerate(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["modules", "what", "by", "why", "first"]
    assert "LayerNorm" in lines[2]
    assert json.loads(report.to_json())["swapped"][1] == {
        "path": "norm", "what": "LayerNorm", "by": "layer_norm", "why": "torch.nn.LayerNorm",
    }  # fmt: skip
    estimate = report.estimate(2, 10)
    rows = 20
    norm = (2 + 3) * rows * 16 * 4 + (2 + 4) * 16 * 4 // 2
    table = rows * 8 + 20 * 64 + rows * 64 + rows * 8 + rows * 64 + 64 * 64
    assert estimate.modules == 3
    assert estimate.bytes > norm + table
    assert estimate.flops == 3 * 2 * rows * 16 * 64
    assert estimate.logits_bytes == 3 * rows * 64 * 4
    assert report.estimate(4, 10).seconds > estimate.seconds
    # Each module takes the longer of its two times.
    assert report.estimate(2, 10, flops=math.inf, bandwidth=1e9).seconds == pytest.approx(estimate.bytes / 1e9)
    assert report.estimate(2, 10, flops=1e9, bandwidth=math.inf).seconds == pytest.approx(estimate.flops / 1e9)
    with pytest.raises(ValueError, match="batch must be a positive integer"):
        report.estimate(0)
    assert str(fastllm.accelerate(nn.ReLU())) == "nothing in this model that fastllm serves"


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(need_weights, batch_first):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    other = copy.deepcopy(attention)
    assert fastllm.accelerate(attention).swapped[0].by == "multihead_attention"
    x = torch.randn(5, 6, 16)
    padding = torch.zeros(*((5, 6) if batch_first else (6, 5)), dtype=torch.bool)
    padding[:, -1] = True
    for options in ({}, {"key_padding_mask": padding}):
        got = attention(x, x, x, need_weights=need_weights, **options)
        want = other(x, x, x, need_weights=need_weights, **options)
        torch.testing.assert_close(got, want)
    attention.out_proj.register_forward_hook(lambda *a: pytest.fail("torch never calls out_proj"))
    attention(x, x, x, need_weights=need_weights)


def test_cross_entropy_modules():
    logits = torch.randn(6, 9, 2, requires_grad=True)
    target = torch.randint(9, (6, 2))
    loss = nn.CrossEntropyLoss(weight=torch.rand(9), label_smoothing=0.1, ignore_index=3)
    want = loss(logits, target)
    assert fastllm.accelerate(loss).swapped[0].by == "cross_entropy"
    torch.testing.assert_close(loss(logits, target), want)
    plain = nn.CrossEntropyLoss()
    probabilities = torch.softmax(torch.randn(6, 9, 2), 1)
    want = plain(logits, probabilities)
    fastllm.accelerate(plain)
    torch.testing.assert_close(plain(logits, probabilities), want)


def test_what_torch_refuses_it_refuses_in_its_own_words():
    attention, loss = nn.MultiheadAttention(8, 2), nn.CrossEntropyLoss(ignore_index=1)
    x = torch.randn(3, 2, 8)

    def messages():
        with pytest.raises(RuntimeError) as hint:
            attention(x, x, x, need_weights=False, is_causal=True)
        with pytest.raises(RuntimeError) as ignored:
            loss(x[0], x[0].softmax(-1))
        return str(hint.value), str(ignored.value)

    want = messages()
    assert len(fastllm.accelerate(nn.ModuleList([attention, loss])).swapped) == 2
    assert messages() == want


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LayerNorm(8),
        lambda: nn.RMSNorm(8),
        lambda: Lookalike(8),
        lambda: nn.Embedding(5, 8),
        lambda: nn.CrossEntropyLoss(),
        lambda: nn.Linear(512, 512).bfloat16(),  # swapped where the processor has no 16-bit products
        Bigrams,
    ],
)
def test_what_is_no_tensor_is_refused_in_torchs_words(build):
    module = build()
    other = copy.deepcopy(module)
    fastllm.accelerate(module)
    for given in (None, 3, [1.0, 2.0]):
        arguments = (
            [(given,)] if not isinstance(module, nn.CrossEntropyLoss) else [(given,) * 2, (torch.rand(2, 3), given)]
        )
        for each in arguments:
            with pytest.raises((TypeError, AttributeError)) as theirs:
                other(*each)
            with pytest.raises(type(theirs.value)) as ours:
                module(*each)
            assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("training", [True, False])
def test_attention_to_what_is_no_tensor_is_refused_in_torchs_words(place, training):
    module = nn.MultiheadAttention(16, 2).train(training)
    other = copy.deepcopy(module)
    fastllm.accelerate(module)
    for given in (None, 3, [1.0, 2.0]):
        arguments = [torch.randn(5, 2, 16)] * 3
        arguments[place] = given
        with pytest.raises((TypeError, AttributeError)) as theirs:
            other(*arguments, need_weights=False)
        with pytest.raises(type(theirs.value)) as ours:
            module(*arguments, need_weights=False)
        assert str(ours.value) == str(theirs.value)


def test_class_weights_of_another_dtype_beside_probabilities():
    loss = nn.CrossEntropyLoss(weight=torch.rand(9))
    logits = torch.randn(4, 9).half()
    want = loss(logits, logits.softmax(-1))
    assert fastllm.accelerate(loss).swapped
    got = loss(logits, logits.softmax(-1))
    # PyTorch computes it in half precision.
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(torch.half).eps, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_calls_that_are_not_ours_take_the_forward_from_before():
    model = nn.Sequential(nn.LayerNorm(8), Lookalike(8))
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    x = torch.randn(4, 3, 8)
    batched = torch.vmap(model)(x)
    assert torch.equal(batched, torch.vmap(other)(x))
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, torch.func.jvp(other, (x,), (torch.ones_like(x),))[1])
    gradient = torch.func.grad(lambda t: model(t).square().sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda t: other(t).square().sum())(x))
    assert torch.equal(model(x[0, 0]), other(x[0, 0]))
    meta = copy.deepcopy(model).to("meta")
    assert meta(torch.empty(2, 8, device="meta")).shape == (2, 8)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 7))


def test_residual_around_a_norm_has_the_right_gradient():
    """Liger-Kernel's in-place backward gets this one wrong: y = h + norm(h)."""
    norm = Lookalike(32)
    h = torch.randn(4, 32, requires_grad=True)
    (want,) = torch.autograd.grad((h + norm(h)).square().mean(), h)
    fastllm.accelerate(norm)
    with fastllm.backend("triton") if fastllm.backends.interpreting() else fastllm.backend("auto"):
        (got,) = torch.autograd.grad((h + norm(h)).square().mean(), h)
    torch.testing.assert_close(got, want)


def test_functional_calls_inside_accelerated_only(monkeypatch):
    calls = []

    def spy(function):
        def ours(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return ours

    monkeypatch.setattr(mode, "ROUTES", {f: spy(ours) for f, ours in mode.ROUTES.items()})
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    target = torch.randint(8, (4,))
    ids = torch.randint(10, (3,))
    q = torch.randn(1, 2, 5, 8)

    def everything():
        return [
            F.layer_norm(x, (8,), x[0], x[1]),
            torch.layer_norm(x, (8,)),
            F.rms_norm(x, (8,)),
            F.cross_entropy(x, target, label_smoothing=0.1),
            nn.CrossEntropyLoss()(x, target),
            F.embedding(ids, weight),
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
            *([F.linear_cross_entropy(x, weight, ids.new_zeros(4))] if hasattr(F, "linear_cross_entropy") else []),
        ]

    want = everything()
    assert calls == []
    with fastllm.accelerated():
        got = everything()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    served = len(calls)
    assert served == len(want)
    everything()
    assert len(calls) == served
    with fastllm.accelerated():
        assert torch.vmap(lambda t: F.layer_norm(t, (8,)))(x).shape == x.shape
        assert len(calls) == served
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, (7,))
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([10]), weight)
