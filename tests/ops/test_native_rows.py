"""What is peculiar to the CPU code of norms and cross-entropies (csrc/cpu): widths, extremes, threads, vector units.

That it is right with every option: tests/test_ops.py and tests/ops/test_losses_and_norms_random.py, backend ``native``.
"""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from contract import assert_all_as_true, assert_as_true, run

import fastllm
from fastllm.extension import load as extension
from fastllm.functional import (
    add_layer_norm,
    add_rms_norm,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
)
from fastllm.ops.cross_entropy import kl_rows, products
from fastllm.ops.cross_entropy.kl_call import DIRECTIONS, Divergence
from fastllm.ops.cross_entropy.loss import Labelled, Loss
from fastllm.ops.cross_entropy.native import native_row_losses
from fastllm.registry import OPS, Sample

NEEDS_PRODUCTS = pytest.mark.skipif(
    extension.bf16_products() == "none", reason="this CPU has no products of bf16 (AMX or AVX-512 BF16)"
)
pytestmark = [
    pytest.mark.cpu_level,
    pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler"),
]


def _widened(values) -> tuple:
    return tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 127, 129, 4097, 65537])
def test_rows_of_any_width(columns):
    """Whole and broken runs of the 64 partial sums."""
    torch.manual_seed(columns)
    for name, options in (("add_layer_norm", {"eps": 1e-2}), ("rms_norm", {"eps": 1e-2}), ("cross_entropy", {})):
        op = OPS[name]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, columns).to(dtype).requires_grad_()
            others = (torch.randint(columns, (3,)),) if name == "cross_entropy" else ((columns,),)
            if name == "add_layer_norm":
                others = (torch.zeros(3, columns).to(dtype), *others)
            sample = Sample("", (x, *others), options)
            wide = Sample("", (x.detach().double().requires_grad_(), *_widened(others)), options)
            yardstick, got = run(op.function, sample, "eager"), run(op.function, sample, "native")
            truth = functools.partial(run, op.reference, wide)
            assert_all_as_true(got, truth, yardstick, dtype, f"{name} {columns}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_are_written_past_the_caches_with_the_same_bits(dtype):
    """32 MiB and more: rows that lie at the beginning of a cache line and others, with a broken vector at their end."""
    rows, columns = (32 << 20) // (4104 * dtype.itemsize) + 1, 4104
    x, residual, dy, dh = (torch.randn(37, columns).to(dtype).repeat(rows // 37 + 1, 1)[:rows] for _ in range(4))
    w, b = (torch.randn(columns).to(dtype).requires_grad_() for _ in range(2))

    def bits(some):
        leaves = [t[some].requires_grad_() for t in (x, residual)]
        with fastllm.backend("native"):
            outs = add_layer_norm(*leaves, (columns,), w, b)
            return (*(o.detach() for o in outs), torch.autograd.grad(outs, leaves[0], (dy[some], dh[some]))[0])

    whole = bits(slice(None))
    for some in (slice(0, 7), slice(rows // 2, rows // 2 + 7), slice(rows - 7, rows)):
        for a, part in zip(whole, bits(some), strict=True):
            assert torch.equal(a[some], part)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_normed_is_the_sum_as_it_was_rounded(dtype, dropout_p):
    x, residual = (torch.randn(9, 300).to(dtype) for _ in range(2))
    with fastllm.backend("native"):
        for add, norm in ((add_layer_norm, layer_norm), (add_rms_norm, rms_norm)):
            y, h = add(x, residual, (300,), eps=1e-5, dropout_p=dropout_p)
            assert torch.equal(y, norm(h, (300,), eps=1e-5))


@pytest.mark.parametrize(
    ("dtype", "rows", "columns"),
    [
        *itertools.product((torch.float32, torch.bfloat16, torch.float16), (7,), (1, 63, 65, 1000)),
        *itertools.product((torch.float32, torch.bfloat16, torch.float16), (37,), (2, 21, 64, 127)),  # a lane a row
        (torch.float32, 130, 65552),  # the gradient goes past the caches
    ],
)
def test_plain_rows_of_logits_have_the_bits_of_the_general_way(dtype, rows, columns):
    """Rows whose entropy is wanted go the general way."""
    x = (3 * torch.randn(7, columns)).to(dtype).repeat(rows // 7 + 1, 1)[:rows]
    target = torch.randint(columns, (rows,))
    target[0] = -100
    if columns > 1:
        x[1, 0], x[2, 1:], x[3], x[4, 1] = torch.nan, -torch.inf, -torch.inf, torch.inf
    upstream = torch.rand(rows), torch.rand(rows), None
    labelled = Labelled(x, target, None, Loss(logit_scale=0.7, z_loss=0.1, reduction="none"))
    plain, general = torch.empty_like(x), torch.empty_like(x)
    got = native_row_losses(labelled, upstream, (plain, None), (True, False))
    expected = native_row_losses(labelled, upstream, (general, None), (True, True))
    for a, b in zip((plain, *got[:3]), (general, *expected[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert got[0].isfinite().any()
    torch.testing.assert_close(native_row_losses(labelled, (None,) * 3)[0], got[0], rtol=0, atol=0, equal_nan=True)


def test_logits_of_any_size():
    """exp and tanh where they saturate, and where 1 - 2 / (e^2x + 1) would cancel."""
    spread = torch.cat([torch.linspace(-s, s, 97) for s in (1e-4, 0.1, 0.7, 2, 20, 88, 200, 1e4, 1e30)])
    x = torch.stack([spread, spread.flip(0), spread * 0.01, torch.full_like(spread, -300.0)])
    y = torch.tensor([5, 400, 600, 0])
    for options in ({}, {"softcap": 30.0}, {"softcap": 0.5, "logit_scale": 1e-3}, {"logit_scale": -2.0}):
        op = OPS["cross_entropy"]
        options = options | {"reduction": "none", "return_lse": True}
        truth = functools.partial(run, op.reference, Sample("", (x.double().requires_grad_(), y), options))
        sample = Sample("", (x.clone().requires_grad_(), y), options)
        yardstick, got = run(op.function, sample, "eager"), run(op.function, sample, "native")
        assert_all_as_true(got, truth, yardstick, torch.float32, str(options))


def test_fp64_is_computed_in_fp64():
    x = torch.randn(3, 130, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 129, 5])
    with fastllm.backend("native"):
        assert torch.autograd.gradcheck(lambda x: rms_norm(x, (130,)), x)
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, y, softcap=2.0, label_smoothing=0.1, z_loss=0.1), x)
        assert torch.autograd.gradcheck(lambda x: add_layer_norm(x, x.flip(0), (130,))[0], x)


def test_dropout_keeps_its_share_and_its_gradient_has_the_same_mask():
    x = torch.ones(64, 500, requires_grad=True)
    with fastllm.backend("native"):
        _, h = add_layer_norm(x, torch.zeros(64, 500), (500,), dropout_p=0.25)
    assert set(h.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((h == 0).float().mean() - 0.25) < 0.02
    (dx,) = torch.autograd.grad(h.sum(), x)
    assert torch.equal(dx, h)


def test_vmap_takes_torchs_operators():
    x, w = torch.randn(4, 3, 8), torch.randn(8)
    torch.testing.assert_close(torch.func.vmap(lambda x: rms_norm(x, (8,), w))(x), F.rms_norm(x, (8,), w))
    y = torch.randint(8, (4, 3))
    per_sample = torch.func.vmap(torch.func.grad(lambda x, y: cross_entropy(x, y)))(x, y)
    expected = torch.stack([torch.func.grad(F.cross_entropy)(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(per_sample, expected)


BITS = """
import torch, fastllm
from fastllm.functional import add_layer_norm, cross_entropy, geglu, rms_norm, rotary_embedding, swiglu
held = fastllm.backend("native")
held.__enter__()

def made(*shape):  # torch's own random numbers and sums depend on the instruction set
    return ((torch.arange(torch.Size(shape).numel()) * 7919 % 1009).view(shape) - 504) / 256

results, gated = [], []
for threads in (1, 2, 7):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w, b = (made(*shape).to(dtype).requires_grad_() for shape in ((150, 203), (203,), (203,)))
        y, h = add_layer_norm(x, x.flip(0), (203,), w, b, dropout_p=0.1)
        z = rms_norm(h, (203,), w)
        options = dict(label_smoothing=0.1, softcap=9.0, z_loss=0.01, reduction="none")
        loss = cross_entropy(z * 9, torch.arange(150), **options)
        upstream = (made(150).to(dtype), made(150, 203).to(dtype))
        results.append([t.detach() for t in (y, h, z, loss, *torch.autograd.grad((loss, y), (x, w, b), upstream))])
        gates = swiglu(x * 9, x) + geglu(x * 9, x) + geglu(x * 9, x, approximate="tanh")
        turned, _ = rotary_embedding(x.view(3, 50, 203), None, made(50, 101), made(50, 101).flip(0))
        results[-1] += [turned.detach(), *torch.autograd.grad(turned, x, turned.detach())]
        gated.append([gates.detach(), *torch.autograd.grad(gates, x, upstream[1])])
    for found in (results, gated):
        for mine, first in zip(found[-3:], found[:3], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True)), threads
print(fastllm._C.build_info()["cpu_capability"])
for found in (results, gated):
    print(hash(tuple(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for r in found for t in r)))
"""


def test_same_bits_for_any_number_of_threads_and_any_instruction_set():
    """The baseline's gated products have bits of their own: the other levels fuse products and sums, rounded once."""
    runs, gated = {}, {}
    for wish in ("default", "avx2", "avx512"):
        env = {**os.environ, "ATEN_CPU_CAPABILITY": wish, "PYTHONHASHSEED": "0"}
        result = subprocess.run([sys.executable, "-c", BITS], env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        name, digest, gated_digest = result.stdout.split()
        runs[name] = digest
        if name != "default":
            gated[name] = gated_digest
    assert "default" in runs
    assert len(set(runs.values())) == 1, runs
    assert len(set(gated.values())) <= 1, gated


@NEEDS_PRODUCTS
@pytest.mark.parametrize(
    ("rows", "m", "n"),
    [(1, 1, 1), (31, 33, 17), (64, 128, 32), (1025, 129, 65), (2, 300, 1), (0, 5, 5), (70, 96, 96), (33, 109, 47)],
)
def test_products_of_bf16(rows, m, n):
    wide = torch.randn(rows, m + 7).bfloat16()
    a, b, total = wide[:, 3 : 3 + m], torch.randn(rows, n).bfloat16(), torch.randn(m, n)
    expected = total.double() + a.double().t() @ b.double()
    torch.ops.fastllm.add_product_(total, a, b, False)
    # Summed in fp32, whatever the order.
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * max(rows, 1) ** 0.5)
    first, zeros = torch.full_like(total, torch.nan), torch.zeros_like(total)
    torch.ops.fastllm.add_product_(first, a, b, True)
    torch.ops.fastllm.add_product_(zeros, a, b, False)
    assert torch.equal(first, zeros)


@NEEDS_PRODUCTS
def test_products_refuse_what_does_not_fit():
    a, b = torch.randn(4, 3).bfloat16(), torch.randn(4, 2).bfloat16()
    for total, x, y in ((torch.zeros(2, 3), a, b), (torch.zeros(3, 2), a.float(), b), (torch.zeros(3, 2), a[:3], b)):
        with pytest.raises((RuntimeError, ValueError), match="add_product_"):
            torch.ops.fastllm.add_product_(total, x, y, False)


def test_gradients_of_a_bf16_layer_are_summed_in_fp32():
    """Against the eager form's products in fp32: as close to the truth."""
    torch.manual_seed(0)
    op = OPS["linear_cross_entropy"]
    x, w = torch.randn(300, 40).bfloat16(), (torch.randn(130, 40) * 0.3).bfloat16()
    y = torch.randint(130, (300,))
    options = {"max_workspace_mb": 0.01}

    def grads(dtype, function, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        return run(function, Sample("", (*leaves, y), options), backend)[1]

    truth = grads(torch.float64, op.reference, None)
    for a, b, c in zip(
        grads(torch.bfloat16, linear_cross_entropy, "native"), truth,
        grads(torch.bfloat16, linear_cross_entropy, "eager"), strict=True,
    ):  # fmt: skip
        assert_as_true(a, b, c, torch.bfloat16, "linear_cross_entropy")


def _layer_gradients(dtype, backend):
    """Of (200, 24) rows in chunks, by ``backend``, or by the definition where there is none."""
    torch.manual_seed(3)
    x, w, y = torch.randn(200, 24).bfloat16(), (torch.randn(70, 24) * 0.3).bfloat16(), torch.randint(70, (200,))
    op = OPS["linear_cross_entropy"]
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    function = op.function if backend else op.reference
    return run(function, Sample("", (*leaves, y), {"max_workspace_mb": 0.01}), backend)[1]


def test_without_products_of_bf16_the_gradient_is_summed_in_fp32_by_torch(monkeypatch):
    monkeypatch.setitem(extension._info, "bf16_products", "none")
    monkeypatch.setattr(products, "WIDENED_COLUMNS", 32)  # whole and broken pieces of the 70 columns
    monkeypatch.setattr(products, "_add_bf16_product", lambda *args: pytest.fail("no such product here"))
    truth, eager = _layer_gradients(torch.float64, None), _layer_gradients(torch.bfloat16, "eager")
    for a, b, c in zip(_layer_gradients(torch.bfloat16, "native"), truth, eager, strict=True):
        assert_as_true(a, b, c, torch.bfloat16, "linear_cross_entropy")


@NEEDS_PRODUCTS
def test_info_names_the_products_of_bf16():
    assert extension.bf16_products() in ("amx", "avx512_bf16")
    assert f"bf16 products {extension.bf16_products()}" in fastllm.info()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_add_and_torchs_layer_norm_where_they_are_faster(dtype):
    """Bit for bit PyTorch's own where it serves; 16-bit rows, and those of which something is dropped, are ours."""
    x, h = (torch.randn(5, 40).to(dtype).requires_grad_() for _ in range(2))
    w, b = (torch.randn(40).to(dtype).requires_grad_() for _ in range(2))
    got = add_layer_norm(x, h, (40,), w, b)
    total = x + h
    served = [type(out.grad_fn).__name__ for out in got]
    if dtype == torch.float32:
        assert all(torch.equal(a, b) for a, b in zip(got, (F.layer_norm(total, (40,), w, b), total), strict=True))
        assert "AddBackward0" in served
    else:
        assert served == ["_OrdinaryNormBackward"] * 2
    dropped = add_layer_norm(x, h, (40,), w, b, dropout_p=0.5)
    assert [type(out.grad_fn).__name__ for out in dropped] == ["_NormBackward"] * 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("columns", [1, 63, 64, 129, 4097])
def test_divergences_of_rows_of_any_width(direction, columns):
    """Against the eager rows in fp64, in every dtype, far from 0 too; a gradient is written over its logits."""
    torch.manual_seed(columns)
    how = Divergence(direction, 0.3, 2.0, None, None, -100, "none", None)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        student, teacher = (torch.randn(3, columns + 1) * 30).to(dtype)[:, 1:], torch.randn(3, columns).to(dtype)
        factor = torch.rand(3, dtype=torch.promote_types(dtype, torch.float32))
        log_p, log_q = (torch.log_softmax(z.double() / 2, -1) for z in (teacher, student))
        value, *slopes = kl_rows.divergence_and_slopes(log_p, log_q, how, (True, True))
        found = torch.ops.fastllm.divergence_rows(
            student, teacher, None, factor, student, teacher, DIRECTIONS.index(direction), 0.3, 2.0, 0.0, 0.0
        )
        torch.testing.assert_close(found.double(), 4 * value, rtol=2e-5, atol=1e-5)
        for into, slope in zip((student, teacher), slopes, strict=True):
            expected = 2 * factor.double().unsqueeze(1) * slope
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(into.double(), expected, rtol=max(eps, 2e-5), atol=max(eps, 1e-5))


def test_a_teachers_subnormal_probability_has_its_logarithm():
    teacher = torch.tensor([[1e-40, 0.5, 0.3, 0.2]])
    student, indices = torch.zeros(1, 4), torch.arange(4)[None]
    found = torch.ops.fastllm.divergence_rows(
        student, teacher, indices, None, None, None, DIRECTIONS.index("reverse"), 0.5, 1.0, 0.0, 0.0
    )
    truth = (student.double().softmax(1) * (student.double().log_softmax(1) - teacher.double().log())).sum(1)
    torch.testing.assert_close(found, truth.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1}], ids=["plain", "capped"])
def test_what_an_ignored_rows_logits_are_does_not_reach_its_gradient(dtype, options):
    y = torch.tensor([1, -100, 2, -100, -100])
    x = torch.randn(5, 40).to(dtype)
    expected = torch.zeros_like(x)
    with fastllm.backend("native"):
        for filling in (0.0, torch.nan, torch.inf, -torch.inf):
            x[y < 0] = filling
            leaf = x.clone().requires_grad_()
            (dx,) = torch.autograd.grad(cross_entropy(leaf, y, **options), leaf)
            if filling == 0.0:
                expected = dx
                assert not dx[y < 0].any()
            assert torch.equal(dx, expected)


def test_divergences_refuse_what_does_not_fit():
    x, ids = torch.randn(2, 5), torch.zeros(2, 3, dtype=torch.int64)
    numbers = (0, 0.5, 1.0, 0.0, 0.0)
    for args in (
        (x, x[:, :4], None, None, None, None),
        (x, x[:1], None, None, None, None),
        (x, x[:, :3], ids + 5, None, None, None),
        (x, x[:, :3], ids.int(), None, None, None),
        (x, x, None, None, x, None),
        (x, x, None, torch.ones(2), x.t().contiguous().t(), None),
    ):
        with pytest.raises((RuntimeError, ValueError), match="divergence_rows"):
            torch.ops.fastllm.divergence_rows(*args, *numbers)
