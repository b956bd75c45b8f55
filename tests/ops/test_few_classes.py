"""Cross-entropy of few classes in the extension, where each row is in a lane of a vector of rows."""

import pytest
import torch
import torch.nn.functional as F

import fastllm
from fastllm.functional import cross_entropy

pytestmark = [
    pytest.mark.cpu_level,
    pytest.mark.skipif(fastllm.extension.missing() is not None, reason="no extension here: no C++ compiler"),
]

ROWS = 37  # two vectors of 16 and a part of one
FACTOR = (1 + torch.arange(ROWS) % 4) / 2  # exact in 16 bits
OPTIONS = [
    {},
    {"ignore_index": 1},
    {"logit_scale": 0.7, "z_loss": 1e-2},
    {"weight": True, "z_loss": 1e-3},
]


def loss_and_gradient(x, y, **options):
    x = x.detach().requires_grad_()
    loss, lse = cross_entropy(x, y, reduction="none", return_lse=True, **options)
    loss.backward(FACTOR.to(loss.dtype))
    return loss.detach(), lse.detach(), x.grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 33, 64, 65, 128])
def test_a_row_has_the_numbers_and_the_bits_of_a_row_alone(classes, dtype, options):
    torch.manual_seed(classes)
    x, y = (3 * torch.randn(ROWS, classes)).to(dtype), torch.randint(classes, (ROWS,))
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes)
    together = loss_and_gradient(x, y, **options)
    for i in range(ROWS):
        row = x[i : i + 1].clone().requires_grad_()
        loss, lse = cross_entropy(row, y[i : i + 1], reduction="none", return_lse=True, **options)
        loss.backward(FACTOR[i : i + 1].to(dtype))
        for found, alone in zip(together, (loss, lse, row.grad), strict=True):
            assert torch.equal(found[i : i + 1], alone.detach())
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    exact = loss_and_gradient(x.double(), y, **wide)
    # Half a unit of the last place of 16 bits, and four roundings of fp32 of numbers up to 20.
    unit = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for found, right in zip(together, exact, strict=True):
        assert torch.allclose(found.double(), right, rtol=unit, atol=4 * 20 * 2**-24 + 2**-24 * (unit > 0))


@pytest.mark.parametrize("classes", [2, 10])
def test_infinities_and_nan_stay_in_their_row(classes):
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, classes), torch.randint(classes, (ROWS,))
    clean = loss_and_gradient(x, y)
    x[3], x[5, 0], x[20, 1], x[36] = -torch.inf, torch.nan, -torch.inf, torch.inf
    y[20] = 0
    right = F.cross_entropy(x, y, reduction="none")
    found = loss_and_gradient(x, y)
    touched = [3, 5, 20, 36]
    assert torch.allclose(found[0], right, equal_nan=True)
    assert torch.equal(found[1].isfinite(), torch.logsumexp(x, 1).isfinite())
    others = [i for i in range(ROWS) if i not in touched]
    for one, other in zip(clean, found, strict=True):
        assert torch.equal(one[others], other[others])


def test_an_ignored_row_has_a_gradient_of_zeros_whatever_its_logits_are():
    x, y = torch.full((20, 4), torch.nan).requires_grad_(), torch.full((20,), -100)
    cross_entropy(x, y, reduction="sum").backward()
    assert torch.equal(x.grad, torch.zeros(20, 4))
    assert cross_entropy(x, y, reduction="sum") == F.cross_entropy(x, y, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 3, 17, 64, 65, 127])
def test_rows_have_the_bits_of_rows_of_more_classes_that_have_no_probability(classes, dtype):
    """Rows of 144 classes are computed each by itself, vector by vector."""
    torch.manual_seed(classes)
    x, y = (3 * torch.randn(ROWS, classes)).to(dtype), torch.randint(classes, (ROWS,))
    x[3, 0], x[5] = torch.nan, torch.inf
    wide = F.pad(x, (0, 144 - classes), value=-torch.inf)
    for few, many in zip(loss_and_gradient(x, y, z_loss=1e-2), loss_and_gradient(wide, y, z_loss=1e-2), strict=True):
        many = many[:, :classes] if many.dim() == 2 else many
        assert torch.equal(few.nan_to_num(9), many.nan_to_num(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 16, 21])
def test_loss_and_lse_that_cancel_leave_the_target_its_gradient(classes, dtype):
    """Their difference is the target's logit: the gradient along the probabilities is 0, and the row counts still."""
    torch.manual_seed(classes)
    x, y = torch.randn(ROWS, classes).to(dtype), torch.randint(classes, (ROWS,))
    x[3, 0], y[5] = torch.nan, -100

    def gradient(x):
        x = x.detach().requires_grad_()
        loss, lse = cross_entropy(x, y, reduction="none", return_lse=True)
        torch.autograd.backward((loss, lse), (torch.ones_like(loss), torch.where(y < 0, 0, -torch.ones_like(lse))))
        return x.grad

    few, many = gradient(x), gradient(F.pad(x, (0, 144 - classes), value=-torch.inf))[:, :classes]
    assert few[3].isnan().all()
    assert many[3].isnan().all()
    right = -F.one_hot(y.clamp(min=0), classes).to(dtype)
    right[5] = 0
    counting = torch.arange(ROWS) != 3
    assert torch.equal(few[counting], right[counting])
    assert torch.equal(many[counting], right[counting])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 16, 144])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_ordinary_call_has_the_gradient_bits_of_one_with_an_option(reduction, classes, dtype):
    """``return_lse`` makes it no ordinary call: PyTorch's operators prepare that one's gradient."""
    torch.manual_seed(classes)
    x, y = torch.randn(ROWS, classes).to(dtype), torch.randint(classes, (ROWS,))
    y[::5] = -100
    upstream = (FACTOR if reduction == "none" else torch.tensor(0.75)).to(dtype)
    grads = []
    for more in ({}, {"return_lse": True}):
        leaf = x.clone().requires_grad_()
        found = cross_entropy(leaf, y, reduction=reduction, **more)
        loss = found[0] if more else found
        first = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, leaf, upstream)[0])
        grads.append(first)
    assert torch.equal(*grads)
