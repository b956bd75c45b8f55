"""Models that nobody had in mind: odd classes, odd attributes, odd modes. Never a wrong result, never a crash."""

import copy
import pickle
import typing

import pytest
import torch
import torch.nn.functional as F
from architectures import same_gradients
from lookalikes import Bigrams
from torch import nn

import fastllm


class Base(nn.Module):
    def __init__(self, size=16, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.eps = eps
        self.offset = 0.0

    def forward(self, x):
        return (self.weight + self.offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class NormWithABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))
        self.register_buffer("norm_eps", torch.tensor(1e-6))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm_eps)


class Registry(type):
    """A metaclass that does nothing but be one."""


class Registering(Base):
    subclasses: typing.ClassVar = []

    def __init_subclass__(cls, *, required, **kwargs):
        cls.subclasses.append(cls)


class OwnReduce(Base):
    def __reduce__(self):
        return (_make, (type(self), self.eps), self.__dict__)


class Gate(Base):
    def forward(self, x, gate=None):
        y = super().forward(x)
        return y if gate is None else y * gate


class ByTraining(Base):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else y * 0.5


class ByDimensions(Base):
    def forward(self, x):
        y = super().forward(x)
        return y if x.dim() < 4 else y * 2


class Remembering(Base):
    def forward(self, x):
        self.last = x.abs().mean()
        return super().forward(x)


class Logging(Base):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(x.shape)
        return super().forward(x)


class Bounded(Base):
    def forward(self, x):
        return super().forward(x).clamp(-8, 8)


class KeepsATensor(Base):
    def __init__(self):
        super().__init__()
        self.factor = torch.tensor(1.0)

    def forward(self, x):
        return super().forward(x) * self.factor


class Counting(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def _make(cls, eps):
    return cls(eps=eps)


class FromMeta(nn.Module, metaclass=Registry):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))
        self.eps = 1e-6

    forward = Base.__dict__["forward"]
    offset = 0.0


def test_attributes_that_change_afterwards_are_followed():
    norm = Base()
    other = copy.deepcopy(norm)
    assert fastllm.accelerate(norm).swapped
    x = 1e-3 * torch.randn(3, 16)
    for name, value in (("eps", 1e-3), ("offset", 1.0), ("eps", 1e-8)):
        setattr(norm, name, value)
        setattr(other, name, value)
        torch.testing.assert_close(norm(x), other(x))


def test_buffers_are_not_guessed_at():
    norm = NormWithABuffer()
    assert "buffers" in fastllm.accelerate(norm).left[0].why
    norm.norm_eps.fill_(1.0)
    assert norm(torch.ones(2, 16)).abs().max() < norm.weight.max()


def test_registries_of_subclasses_do_not_see_ours():
    norm = Registering()
    assert fastllm.accelerate(norm).swapped
    assert Registering.subclasses == []
    assert fastllm.accelerate(FromMeta()).swapped


def test_a_class_with_its_own_way_of_pickling():
    norm = OwnReduce(eps=1e-5)
    fastllm.accelerate(norm)
    for again in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm), copy.copy(norm)):
        assert again.eps == 1e-5
        assert torch.equal(again.weight, norm.weight)
        assert fastllm.revert(again) == 1
        assert type(again) is OwnReduce


def test_other_arguments_take_the_forward_from_before():
    norm = Gate()
    other = copy.deepcopy(norm)
    assert fastllm.accelerate(norm).swapped
    x, gate = torch.randn(2, 16), torch.randn(2, 16)
    torch.testing.assert_close(norm(x=x), other(x))
    assert torch.equal(norm(x, gate), other(x, gate))
    assert torch.equal(norm(x, gate=gate), other(x, gate=gate))
    with pytest.raises(TypeError):
        norm()


@pytest.mark.parametrize("cls", [ByTraining, ByDimensions, Remembering, Logging, Bounded, KeepsATensor])
def test_forwards_of_two_minds_are_left(cls):
    norm = cls()
    assert fastllm.accelerate(norm).left
    assert type(norm) is cls
    assert not getattr(norm, "log", None)


def test_measuring_leaves_the_module_as_it_was():
    norm = Counting()
    state, calls = dict(vars(norm)), []
    norm.register_forward_pre_hook(lambda *a: calls.append(1))
    fastllm.accelerate(norm, dry_run=True)
    assert norm.calls == 0
    assert calls == []
    assert vars(norm).keys() == state.keys()
    assert norm.weight is state["_parameters"]["weight"]
    assert norm.weight._version == 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("cls", [Base, nn.LayerNorm, nn.RMSNorm])
def test_autocast_gives_the_dtype_that_it_gave(cls):
    norm = cls(16)
    for dtype in (torch.float32, torch.bfloat16):
        norm.to(dtype)
        other = copy.deepcopy(norm)
        fastllm.accelerate(norm)
        for given in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 16).to(given)
            with torch.autocast("cpu", torch.bfloat16):
                try:
                    want = other(x)
                except RuntimeError:
                    continue
                got = norm(x)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)
        fastllm.revert(norm)


def test_inference_mode():
    with torch.inference_mode():
        model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4), "norm": nn.LayerNorm(4)})
        fastllm.accelerate(model)
        ids = torch.arange(5)
        assert model["norm"](model["a"](ids) + model["b"](ids)).shape == (5, 4)
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    fastllm.accelerate(model)
    with torch.inference_mode():
        assert model["head"](model["a"](ids) + model["b"](ids)).shape == (5, 9)


def bigrams():
    """A model accelerated, and as it is."""
    model = Bigrams()
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    return model, other


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_on_the_whole_model():
    grads = []
    for model in bigrams():
        model.register_full_backward_hook(lambda module, given, output: grads.append(output[0].clone()))
        logits = model(torch.arange(6).view(2, 3))
        F.cross_entropy(logits.view(-1, 20), torch.arange(6)).backward()
        grads.append(model.head.weight.grad)
    torch.testing.assert_close(grads[:2], grads[2:])


def test_reentrant_checkpoint_around_the_head():
    model, other = bigrams()
    for each in (model, other):
        h = each.tokens(torch.arange(6))
        logits = torch.utils.checkpoint.checkpoint(each.head, h, use_reentrant=True)
        F.cross_entropy(logits, torch.arange(6)).backward()
    same_gradients(model, other)


def test_an_autoencoder_whose_head_only_looks_like_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Sequential(nn.Linear(8, 20)))
    both = nn.ModuleDict({"body": model, "table": nn.Embedding(20, 3)})
    other = copy.deepcopy(model)
    assert "linear_cross_entropy" in {e.by for e in fastllm.accelerate(both).swapped}
    x = torch.randn(5, 20)
    for each in (model, other):
        out = each(x)
        nn.MSELoss()(out, x).backward(retain_graph=True)
        out.backward(torch.ones_like(out))
        torch.autograd.backward([each(x)], [torch.ones(5, 20)])
        out = each(x)
        out += 1
        out.sum().backward()
    same_gradients(model, other)


def test_foreign_methods_that_raise_are_no_obstacle():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def get_output_embeddings(self):
            raise KeyError("nothing here")

    assert len(fastllm.accelerate(Odd()).swapped) == 1


def test_modules_without_parameters_and_empty_models():
    assert fastllm.accelerate(nn.Sequential()).swapped == []
    assert fastllm.revert(nn.Sequential()) == 0
    norm = nn.LayerNorm(8, elementwise_affine=False)
    x = torch.randn(3, 8)
    want = norm(x)
    fastllm.accelerate(norm)
    torch.testing.assert_close(norm(x), want)
    assert norm(torch.empty(0, 8)).shape == (0, 8)


class Hidden(Base):
    """What its forward depends on: a private attribute, one that is None at first, a value in a dictionary."""

    def __init__(self, factor=1.0):
        super().__init__()
        self._factor, self.extra, self.options = factor, None, {"shift": 0.0}

    def forward(self, x):
        y = super().forward(x) * self._factor + self.options["shift"]
        return y if self.extra is None else y * self.extra


def test_attributes_of_all_kinds_tell_modules_apart_and_are_followed():
    norms = nn.ModuleList([Hidden(), Hidden(3.0), Hidden()])
    others = copy.deepcopy(norms)
    assert [e.path for e in fastllm.accelerate(norms).swapped] == ["0", "2"]
    x = torch.randn(3, 16)
    for change in (
        lambda n: None, lambda n: setattr(n, "_factor", 2.0), lambda n: setattr(n, "extra", 0.5),
        lambda n: n.options.update(shift=1.0),
    ):  # fmt: skip
        for norm, other in zip(norms, others, strict=True):
            change(norm)
            change(other)
            torch.testing.assert_close(norm(x), other(x))
