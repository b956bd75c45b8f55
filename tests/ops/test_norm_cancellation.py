"""Layer norm where numbers cancel: equal columns, and means large beside the spread, in every form of kernel."""

import pytest
import torch
from conftest import DEVICE
from contract import assert_all_as_true, copy, run, truth_of
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import fastllm
from fastllm import OPS
from fastllm.functional import add_layer_norm, layer_norm
from fastllm.kernels.norm import backward, forward, long_row
from fastllm.ops.norm.call import NormForward
from fastllm.ops.norm.operator import forward_by
from fastllm.registry import Sample

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

# Name -> what makes the launchers take that form for rows of 33 to 64 columns; (module, constant) -> value.
FORMS = {
    "tile": {},
    "long": {(long_row, "LONG"): 32, (long_row, "UNALIGNED_LONG"): 32, (long_row, "SEGMENT"): 32},
    "cluster": {(forward, "FWD_ROW"): 16, (backward, "BWD_ROW"): 16, (long_row, "SEGMENT"): 8},
    "packed": {(forward, "FWD_ROW"): 32, (backward, "BWD_ROW"): 0},
    "blocked": {(forward, "FWD_ROW"): 0, (forward, "BLOCKED_COLS"): 16, (backward, "BWD_ROW"): 0},
}
# packed: 16-bit rows of an even number of columns; of other rows these constants make clusters.
FORMS_OF = [(form, dtype) for form in FORMS for dtype in (torch.float32, torch.float16, torch.bfloat16)]
FORMS_OF = [(form, dtype) for form, dtype in FORMS_OF if form != "packed" or dtype != torch.float32]
DRAWS = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
# fp32's numbers but the subnormal ones and those of which the sum of a row would overflow.
NUMBERS = st.builds(
    lambda digits, exponent: digits * 2.0**exponent, st.integers(-(2**24), 2**24), st.integers(-120, 85)
)


@pytest.fixture
def form(request, monkeypatch):
    for (module, constant), value in FORMS[request.param].items():
        monkeypatch.setattr(module, constant, value)
    return request.param


def _statistics(x, backend):
    """(y, mean, rstd) as the operator gives them."""
    with fastllm.backend(backend):
        y, _, mean, rstd = forward_by(NormForward(x, None, None, None, None, 1e-5, 0.0, 0.0, True, backend))
    return y, mean, rstd


def _finite(dtype, n_cols):
    """Every number of a 16-bit ``dtype`` of which the sum of ``n_cols`` is finite in fp32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    return every[every.isfinite() & (every.double().abs() * n_cols < torch.finfo(torch.float32).max)]


def _check_equal_columns(values, n_cols, backend):
    x = values[:, None].expand(-1, n_cols).contiguous().requires_grad_()
    weight, bias = (torch.randn(n_cols, device=DEVICE).to(x.dtype).requires_grad_() for _ in range(2))
    y, mean, rstd = _statistics(x.detach(), backend)
    assert not y.any()
    assert torch.equal(mean, values.to(mean.dtype))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))
    with fastllm.backend(backend):
        for y in (
            layer_norm(x, (n_cols,), weight, bias) if backend != "native" else bias.expand_as(x),
            add_layer_norm(x, torch.zeros_like(x), (n_cols,), weight, bias)[0],
        ):
            assert torch.equal(y, bias.expand_as(x))
        dweight, dx = torch.autograd.grad(y, (weight, x), torch.ones_like(y))
    assert not dweight.any()
    assert dx.isfinite().all()


@pytest.mark.parametrize(("form", "dtype"), FORMS_OF, indirect=["form"])
@DRAWS
@given(
    n_cols=st.integers(17, 32).map(lambda n: 2 * n),
    values=st.lists(NUMBERS, min_size=1, max_size=40),
)
# Times rstd these are infinite: a lane past the row that took the mean off its 0 would make NaN of the row's sums.
@example(n_cols=34, values=[2.0**121, -(2.0**121)])
def test_the_norm_of_equal_columns_is_nought(form, dtype, n_cols, values):
    most = torch.finfo(dtype).max / 64
    values = torch.tensor(values, device=DEVICE).clamp(-most, most).to(dtype)
    _check_equal_columns(values, n_cols, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_cols", [3, 100, 769])
def test_the_norm_of_equal_columns_is_nought_for_every_16_bit_number(dtype, n_cols):
    if fastllm.backends.why_not("native", "cpu") is not None:
        pytest.skip(fastllm.backends.why_not("native", "cpu"))
    _check_equal_columns(_finite(dtype, n_cols), n_cols, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@DRAWS
@given(n_cols=st.integers(1, 3000), values=st.lists(NUMBERS, min_size=1, max_size=9))
def test_the_norm_of_equal_columns_is_nought_in_the_extension_and_the_definition(dtype, n_cols, values):
    x = torch.tensor(values, dtype=dtype)
    if fastllm.backends.why_not("native", "cpu") is None:
        _check_equal_columns(x, n_cols, "native")
    assert not OPS["layer_norm"].reference(x[:, None].expand(-1, n_cols), (n_cols,)).any()


@pytest.mark.parametrize(("form", "dtype"), FORMS_OF, indirect=["form"])
@DRAWS
@given(
    n_cols=st.integers(17, 32).map(lambda n: 2 * n),
    exponents=st.lists(st.floats(-1.0, 7.0), min_size=1, max_size=20),
    seed=st.integers(0, 2**30),
)
def test_means_large_beside_the_spread(form, dtype, n_cols, exponents, seed):
    """The mean is the true one to a unit in the last place, and outputs and gradients are as near as eager's."""
    generator = torch.Generator().manual_seed(seed)
    means = 10.0 ** torch.tensor(exponents).clamp(max=4.0 if dtype == torch.float16 else 7.0)

    def made(*shape):
        return torch.randn(shape, generator=generator)

    x = (means[:, None] + made(len(exponents), n_cols)).to(DEVICE, dtype)
    weight, bias = (made(n_cols).to(DEVICE, dtype) for _ in range(2))
    _, mean, _ = _statistics(x, "triton")
    wide = x.double()
    unit = torch.nextafter(mean.abs(), torch.full_like(mean, torch.inf)) - mean.abs()
    # A unit in the last place, and fp32's rounding of deviations of 1. The packed form sums distances from the row's
    # first number once: each is rounded, and so are the 6 levels of a tree of 64.
    rounded = 7 * (wide - wide[:, :1]).abs().amax(1) if form == "packed" else 1.0
    assert ((mean.double() - wide.mean(1)).abs() <= unit + 2.0**-24 * rounded).all()
    sample = Sample(
        "", (x.requires_grad_(), (n_cols,)), dict(weight=weight.requires_grad_(), bias=bias.requires_grad_())
    )
    op = OPS["layer_norm"]
    yardstick = run(op.function, copy(sample), "eager")
    assert_all_as_true(run(op.function, copy(sample), "triton"), truth_of(op, sample), yardstick, dtype, form)


def test_equal_columns_of_a_row_that_is_packed():
    """At the packed form's own width, where sums need more than fp32's 24 bits: of fewer columns they are exact.

    With the sum taken from 0 instead of from the row's first number 5 of these 12 rows have another mean.
    """
    n_cols = 65_534
    values = (torch.rand(12, generator=torch.Generator().manual_seed(0)) * 2 + 0.1).to(DEVICE, torch.float16)
    y, mean, _ = _statistics(values[:, None].expand(-1, n_cols).contiguous(), "triton")
    assert not y.any()
    assert torch.equal(mean, values.to(mean.dtype))


@pytest.mark.parametrize("n_cols", [65537, 262_144])
def test_the_mean_of_a_row_wider_than_any_tile(n_cols):
    x = 1e4 + torch.randn(2, n_cols, device=DEVICE)
    _, mean, rstd = _statistics(x, "triton")
    assert ((mean.double() - x.double().mean(1)).abs() <= 2.0**-10).all()  # fp32's unit between 2^13 and 2^14
    torch.testing.assert_close(rstd.double(), (x.double().var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
