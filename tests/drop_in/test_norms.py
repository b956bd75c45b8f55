"""Norms are recognised by what they compute; what only looks like one is left, with the reason."""

import copy

import pytest
import torch
from contract import assert_as_true
from lookalikes import (
    AnotherArgument,
    BoundedBelow,
    CentredLookalike,
    InPlace,
    L2NormOfWidth,
    Lookalike,
    Noisy,
    OtherDimension,
    OutsideTheRoot,
    Pair,
    Partial,
    SampleDeviation,
    StoppedGradient,
    Wrong,
    ZeroCentred,
)

import fastllm


@pytest.mark.parametrize(
    ("cls", "formula"),
    [
        (Lookalike, "x / rms * weight"),
        (ZeroCentred, "x / rms * (1 + weight)"),
        (CentredLookalike, "(x - mean) / std * weight"),
        (L2NormOfWidth, "x / rms"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_recognised_by_what_they_compute(cls, formula, dtype):
    norm = (cls(24) if cls is not L2NormOfWidth else cls()).to(dtype)
    other = copy.deepcopy(norm)
    report = fastllm.accelerate(norm)
    assert report.swapped[0].why == f"measured: {formula}"
    x = torch.randn(3, 4, 24).to(dtype)
    grad = torch.randn(3, 4, 24)
    results = []
    for module, width in ((norm, dtype), (other, dtype), (copy.deepcopy(other).double(), torch.float64)):
        # The oracle must not narrow to fp32 on the way.
        leaf = x.detach().to(width).requires_grad_()
        module.zero_grad()
        y = _oracle(cls, module, leaf) if width is torch.float64 else module(leaf)
        y.backward(grad.to(y.dtype))
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for got, eager, truth in zip(*results, strict=True):
        assert_as_true(got, truth, eager, dtype, cls.__name__)
    fastllm.revert(norm)
    assert torch.equal(norm(x), other(x))


def _oracle(cls, module, x):
    x = x - x.mean(-1, keepdim=True) if cls is CentredLookalike else x
    eps = getattr(module, "variance_epsilon", None) or module.eps
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y * (module.weight + (cls is ZeroCentred)) if hasattr(module, "weight") else y


class ShiftedNorm(torch.nn.Module):
    """A norm with a bias, which may leave next to nothing of an output; ``center`` says which norm."""

    def __init__(self, size, center):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.bias = torch.nn.Parameter(torch.zeros(size))
        self.center, self.eps = center, 1e-6

    def forward(self, x):
        y = x.float()
        y = y - y.mean(-1, keepdim=True) if self.center else y
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight + self.bias).to(x.dtype)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_with_a_bias_are_recognised_in_every_width(center, dtype):
    tables = []
    for size in (24, 256, 768, 4096):
        norm = ShiftedNorm(size, center).to(dtype)
        assert fastllm.accelerate(norm).swapped, size
        tables.append(norm.fastllm_kind.options.dtypes)
    assert all(table == tables[0] for table in tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_that_cancels_leaves_nothing_but_what_one_rounding_does(dtype):
    torch.manual_seed(0)
    norm, x = ShiftedNorm(64, False).to(dtype), torch.randn(1, 64).to(dtype)
    with torch.no_grad():
        norm.bias.zero_()
        norm.bias.copy_(-norm(x)[0])
        expected = norm(x)
        assert fastllm.accelerate(norm).swapped
        torch.testing.assert_close(norm(x), expected, rtol=0.02, atol=1e-6)
    assert expected.abs().max() > 1e-4


class BiasAfterwards(ShiftedNorm):
    """One that rounds what it scales before the bias is added."""

    def forward(self, x):
        y = x - x.mean(-1, keepdim=True) if self.center else x
        return torch.nn.functional.rms_norm(y, self.weight.shape, self.weight, self.eps) + self.bias


@pytest.mark.parametrize("cls", [ShiftedNorm, BiasAfterwards])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_a_norm_is_added_and_gets_its_gradient(cls, center, dtype):
    torch.manual_seed(0)
    norm = cls(64, center)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    norm = norm.to(dtype)
    other = copy.deepcopy(norm)
    assert fastllm.accelerate(norm).swapped or cls is not ShiftedNorm
    x, grad = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)

    def taken(forward, dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in (x, norm.weight, norm.bias)]
        with torch.no_grad():
            alone = forward(*given)
        y = forward(*given)
        return y, alone, *torch.autograd.grad(y, given, grad.to(y.dtype))

    def formula(x, weight, bias):
        y = x - x.mean(-1, keepdim=True) if center else x
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * weight + bias

    def called(module):
        return lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, (x,))

    results = taken(called(norm), dtype), taken(called(other), dtype), taken(formula, torch.float64)
    for got, eager, truth in zip(*results, strict=True):
        assert_as_true(got, truth, eager, dtype, cls.__name__)


class UnscaledNorm(torch.nn.Module):
    """An embedding's norm without parameters."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class TwoDimensions(Lookalike):
    """A norm that takes no vector."""

    def forward(self, x):
        if x.dim() < 2:
            raise ValueError("rows, please")
        return super().forward(x)


def test_a_single_row_has_the_bits_that_it_has_among_others():
    # Models look for the rows of a special token by comparing them with that token's own.
    for norm in (Lookalike(96), CentredLookalike(96), UnscaledNorm()):
        assert fastllm.accelerate(norm).swapped
        x = torch.randn(50, 96)
        with torch.no_grad():
            rows = norm(x)
            assert all(torch.equal(norm(row), out) for row, out in zip(x, rows, strict=True)), type(norm)


def test_a_norm_that_takes_no_vector_still_takes_none():
    norm = TwoDimensions(96)
    assert fastllm.accelerate(norm).swapped
    with pytest.raises(ValueError, match="rows, please"):
        norm(torch.randn(96))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (OutsideTheRoot, "it adds eps outside the square root"),
        (BoundedBelow, "it bounds the root mean square by eps from below"),
        (SampleDeviation, "it divides by the sample's standard deviation"),
        (OtherDimension, "no RMS or layer norm"),
        (StoppedGradient, "its gradient for input is not that of the formula"),
        (Noisy, "in training its forward is another"),
        (InPlace, "its forward changes its input"),
        (Pair, "does not return one tensor"),
        (Partial, "no RMS or layer norm"),
        (AnotherArgument, "does not take a lone random tensor"),
        (Wrong, "RuntimeError: no such device"),
    ],
)
def test_what_only_looks_like_a_norm_is_left(cls, why):
    norm = cls(32)
    random_state = torch.get_rng_state()
    report = fastllm.accelerate(norm)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.swapped == []
    assert why in report.left[0].why
    assert type(norm) is cls


class Repairing(Lookalike):
    """A norm whose output is always finite."""

    def forward(self, x):
        return torch.nan_to_num(super().forward(x))


class RepairingHalves(Lookalike):
    """One that bounds what overflowed, in fp16 alone."""

    def forward(self, x):
        y = super().forward(x)
        return y.nan_to_num(0.0) if x.dtype == torch.float16 else y


class AnotherWithoutGradients(Lookalike):
    """One with a shorter way where nothing is differentiated, and another eps there."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        return self.weight * torch.nn.functional.rms_norm(x, self.weight.shape, None, 1e-3)


class BoundedInput(Lookalike):
    """One that lets nothing in that fp16 could not hold."""

    def forward(self, x):
        return super().forward(x.clamp(-65504.0, 65504.0))


class ByLayout(Lookalike):
    """One that is another for tensors that are not contiguous."""

    def forward(self, x):
        return super().forward(x) if x.is_contiguous() else super().forward(x).relu()


@pytest.mark.parametrize("cls", [Repairing, BoundedInput, ByLayout, AnotherWithoutGradients])
def test_norms_that_are_others_for_some_values_or_calls_are_left(cls):
    norm = cls(32)
    assert fastllm.accelerate(norm).swapped == []


def test_a_norm_that_repairs_one_dtype_keeps_its_forward_for_that():
    norm = RepairingHalves(32)
    assert fastllm.accelerate(norm).swapped
    x = torch.randn(3, 32)
    x[0, 0] = float("inf")
    assert not norm(x).isfinite().all()
    assert norm(x.half()).isfinite().all()


def test_squares_in_sixteen_bits_are_another_arithmetic():
    class Narrow(Lookalike):
        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    norm = Narrow(64).half()
    report = fastllm.accelerate(norm)
    assert "in float16 its arithmetic is another" in report.left[0].why
    wide = Narrow(64)
    assert fastllm.accelerate(wide).swapped
    wide.half()
    x = torch.full((2, 64), 300.0).half()
    assert torch.equal(wide(x), norm(x))
    assert wide(x).eq(0).all()


class NormByDtype(Lookalike):
    """One whose eps depends on the dtype of its input: another one in 16 bits, or the dtype's own."""

    def __init__(self, size, of_dtype):
        super().__init__(size)
        del self.variance_epsilon
        self.of_dtype = of_dtype

    def forward(self, x):
        eps = torch.finfo(x.dtype).eps if self.of_dtype else 1e-5 if x.dtype == torch.float32 else 1e-3
        y = x.float()
        return (self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


@pytest.mark.parametrize("of_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_eps_that_depends_on_the_dtype_is_kept(of_dtype, dtype):
    norm = NormByDtype(64, of_dtype)
    other = copy.deepcopy(norm).to(dtype)
    assert fastllm.accelerate(norm).swapped
    x = 1e-3 * torch.randn(3, 64).to(dtype)
    assert torch.equal(norm.to(dtype)(x), other(x))
    assert "another eps" in fastllm.accelerate(other).left[0].why


def test_mixed_dtypes_keep_the_output_dtype():
    norm = Lookalike(16)
    other = copy.deepcopy(norm)
    fastllm.accelerate(norm)
    x = torch.randn(4, 16).bfloat16()
    assert norm(x).dtype == other(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), other(x), rtol=2**-7, atol=0)
    # In fp64 the original computes in fp32; ours would not, so it is not ours.
    assert torch.equal(norm.double()(x.double()), other.double()(x.double()))
