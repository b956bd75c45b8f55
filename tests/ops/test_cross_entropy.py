"""What is peculiar to cross-entropy: torch's own samples, its errors, its odd corners."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_as_true, backend_fixture

import fastllm
from fastllm.backends import pick
from fastllm.bench.traffic import count_traffic
from fastllm.functional import cross_entropy
from fastllm.kernels.cross_entropy import forward as kernel
from fastllm.kernels.cross_entropy import logits
from fastllm.ops.cross_entropy.call import cross_entropy_call
from fastllm.ops.cross_entropy.cross_entropy import (
    MAX_MAP_CLASSES,
    MAX_NARROW_MAP_CLASSES,
    cross_entropy_reference,
)
from fastllm.ops.cross_entropy.loss import Labelled, Loss

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

BACKENDS = ("eager", "triton")

backend = backend_fixture(*BACKENDS)


def _gradient(function, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), x.grad


def test_one_hot_probabilities_equal_indices(backend):
    x, y, w = torch.randn(6, 9, device=DEVICE), torch.randint(0, 9, (6,), device=DEVICE), torch.rand(9, device=DEVICE)
    options = dict(weight=w, label_smoothing=0.2, z_loss=0.1, reduction="sum")
    by_index, by_index_grad = _gradient(cross_entropy, x, y, **options)
    by_q, by_q_grad = _gradient(cross_entropy, x, F.one_hot(y, 9).float(), **options)
    torch.testing.assert_close(by_index, by_q)
    torch.testing.assert_close(by_index_grad, by_q_grad)


@pytest.mark.runs_on("anywhere")
def test_maps_of_few_classes_are_pytorchs_on_a_cpu():
    def served(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
        return pick("cross_entropy", cross_entropy_call(x, torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.int64)))

    for map_of_few in (
        served((2, 3, 4, 4)), served((2, MAX_MAP_CLASSES, 9), torch.float64),
        served((2, MAX_NARROW_MAP_CLASSES, 9), torch.bfloat16),
    ):  # fmt: skip
        assert map_of_few.backend == "eager"
        assert "positions" in map_of_few.why
    for other in (
        served((32, 3)), served((2, MAX_MAP_CLASSES + 1, 9)), served((2, MAX_NARROW_MAP_CLASSES + 1, 9), torch.float16),
        served((2, 3, 4, 4), memory_format=torch.channels_last),
    ):  # fmt: skip
        assert "positions" not in other.why


def test_all_ignored_is_nan_with_zero_gradients(backend):
    for smoothing, z in ((0.0, 0.0), (0.1, 0.1)):
        target = torch.full((5,), -100, device=DEVICE)
        loss, grad = _gradient(
            cross_entropy, torch.randn(5, 7, device=DEVICE), target, label_smoothing=smoothing, z_loss=z
        )
        assert loss.isnan()
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"softcap": 3.0}, {"return_lse": True}])
def test_a_mean_over_classes_of_no_weight_is_nan_whatever_smoothing_adds(backend, options):
    x, y = torch.randn(4, 5, device=DEVICE), torch.tensor([1, 1, -100, 1], device=DEVICE)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], device=DEVICE)
    assert F.cross_entropy(x, y, weight, label_smoothing=0.1).isnan()
    for smoothing in (0.0, 0.1, 1.0):
        for function in (cross_entropy, cross_entropy_reference):
            with fastllm.backend(backend):
                leaf = x.clone().requires_grad_()
                loss = function(leaf, y, weight, label_smoothing=smoothing, **options)
                loss = loss[0] if isinstance(loss, tuple) else loss
                (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.isnan()
            assert not grad[y != -100].isfinite().any()
            assert (grad[y == -100] == 0).all()


def test_ignored_rows_have_exactly_zero_loss_and_gradient(backend):
    x, y = torch.randn(6, 40, device=DEVICE), torch.tensor([3, -100, 2, -100, 0, 39], device=DEVICE)
    loss, grad = _gradient(cross_entropy, x, y, reduction="none", label_smoothing=0.1, z_loss=0.1)
    assert (loss[y == -100] == 0).all()
    assert (grad[y == -100] == 0).all()
    assert (grad[y != -100] != 0).any(1).all()


@pytest.mark.parametrize("masked", [1, 4096, 8191, 32768])
def test_leading_minus_infinities(backend, masked):
    classes = max(8192, masked) + 5
    x = torch.randn(2, classes, device=DEVICE)
    x[:, :masked] = -math.inf
    y = torch.tensor([classes - 5, classes - 2], device=DEVICE)
    loss, grad = _gradient(cross_entropy, x, y)
    expected, expected_grad = _gradient(F.cross_entropy, x, y)
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_infinite_loss_and_nan_where_torch_has_them(backend):
    rows = torch.tensor(
        [[0.0, -math.inf, 1.0], [-math.inf] * 3, [0.0, math.inf, 1.0], [0.0, math.nan, 1.0]], device=DEVICE
    )
    y = torch.tensor([1, 0, 0, 2], device=DEVICE)
    loss, grad = _gradient(cross_entropy, rows, y, reduction="none")
    expected, expected_grad = _gradient(F.cross_entropy, rows, y, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_shifted_logits_keep_their_precision(backend, dtype):
    x = (torch.randn(4, 300, device=DEVICE, dtype=torch.float64) + 1000).to(dtype)
    y = torch.randint(0, 300, (4,), device=DEVICE)
    truth, truth_grad = _gradient(cross_entropy_reference, x.double(), y, label_smoothing=0.1)
    theirs, theirs_grad = _gradient(F.cross_entropy, x, y, label_smoothing=0.1)
    loss, grad = _gradient(cross_entropy, x, y, label_smoothing=0.1)
    assert_as_true(loss, truth, theirs, dtype, "loss")
    assert_as_true(grad, truth_grad, theirs_grad, dtype, "gradient")


def test_the_targets_own_gradient_keeps_its_precision_in_bf16():
    # p is 1 - 1e-4 here: p - 1 after rounding p to bf16 would be 0.
    x = torch.zeros(1, 64, device=DEVICE)
    x[0, 5] = math.log(63 * 1e4)
    with fastllm.backend("triton"):
        _, grad = _gradient(cross_entropy, x.bfloat16(), torch.tensor([5], device=DEVICE))
    _, truth = _gradient(cross_entropy_reference, x.bfloat16().double(), torch.tensor([5], device=DEVICE))
    torch.testing.assert_close(grad[0, 5].double(), truth[0, 5], rtol=4e-3, atol=0)


def test_mean_in_bf16_is_summed_in_fp32():
    x, y = torch.randn(4097, 3, device=DEVICE).bfloat16(), torch.randint(0, 3, (4097,), device=DEVICE)
    with fastllm.backend("triton"):
        loss = cross_entropy(x, y)
    truth = cross_entropy_reference(x.double(), y)
    torch.testing.assert_close(loss.double(), truth, rtol=4e-3, atol=0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the CPU code")
@pytest.mark.runs_on("interpreter")
def test_small_losses_beside_a_huge_one_are_not_lost_in_the_sum():
    """Next to 1e17 the numbers of fp64 are 16 apart, and 40 is between two of them: what a step loses is carried on."""
    x = torch.zeros(65, 2, dtype=torch.float64)
    x[:, 1], x[0, 1] = 40.0, 1e17
    y = torch.zeros(65, dtype=torch.int64)
    with fastllm.backend("native"):
        assert cross_entropy(x, y, reduction="sum").item() == 1e17 + 64 * 40


def test_under_autocast_the_loss_is_fp32(backend):
    x, y = torch.randn(3, 8, device=DEVICE).bfloat16(), torch.tensor([1, 2, 3], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mine, theirs = cross_entropy(x, y), F.cross_entropy(x, y)
    assert mine.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device-side assert ends the process's use of the GPU")
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_out_of_range_target(backend, bad):
    target = torch.tensor([[1, 2], [bad, 3]], device=DEVICE)
    with pytest.raises(IndexError, match=rf"target {bad} at position \[1, 0\] .*\[0, 7\)"):
        cross_entropy(torch.randn(2, 7, 2, device=DEVICE), target)
    with pytest.raises(IndexError, match="out of range"):
        cross_entropy(torch.randn(2, 7, 2, device=DEVICE), target, reduction="sum", z_loss=0.1, label_smoothing=0.1)


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_out_of_range_target_shows_as_nan_where_asserts_are_compiled_out(monkeypatch, bad):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_assert", lambda *args: None)
    x, target = torch.randn(4, 8, 1)[:, :7], torch.tensor([[1], [bad], [3], [-100]])
    for weight in (None, torch.rand(7)):
        labelled = Labelled(x, target, weight, Loss(reduction="none"))
        loss, _, stats, _, _ = kernel.cross_entropy_fwd(labelled, torch.float32)
        assert loss.isnan().tolist() == stats[2].isnan().tolist() == [False, True, False, False]
        mean = labelled._replace(loss=Loss())
        loss, _, _, total, dx = kernel.cross_entropy_fwd(mean, torch.float32, with_gradient=True)
        assert loss.isnan()
        assert total == (2 if weight is None else weight[1] + weight[3])
        assert dx.isnan().flatten(1).all(1).tolist() == [False, True, False, False]
        assert dx[[0, 2, 3]].isfinite().all()


def test_ignore_index_may_be_out_of_range_or_a_class(backend):
    x, y = torch.randn(4, 5, device=DEVICE), torch.tensor([0, 255, 2, 3], device=DEVICE)
    for ignore_index in (255, -7):
        target = torch.where(y == 255, ignore_index, y)
        torch.testing.assert_close(
            cross_entropy(x, target, ignore_index=ignore_index), F.cross_entropy(x, target, ignore_index=ignore_index)
        )


def test_byte_targets_and_mixed_dtypes(backend):
    x = torch.randn(4, 5, device=DEVICE).bfloat16()
    y = torch.tensor([0, 4, 2, 3], device=DEVICE)
    assert cross_entropy(x, y.to(torch.uint8)) == cross_entropy(x, y)
    weight = torch.rand(5, device=DEVICE)
    loss = cross_entropy(x, y, weight)
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss, cross_entropy_reference(x, y, weight))
    q = torch.softmax(torch.randn(4, 5, device=DEVICE), 1)
    assert cross_entropy(x, q).dtype == F.cross_entropy(x, q).dtype == torch.float32


def test_compiles_whole_where_nothing_needs_a_gradient(backend):
    torch._dynamo.reset()
    x, y = torch.randn(4, 5, device=DEVICE), torch.tensor([0, 4, -100, 3], device=DEVICE)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))


def test_deprecated_flags(backend):
    x, y = torch.randn(4, 5, device=DEVICE), torch.tensor([0, 4, 2, 3], device=DEVICE)
    for flags, reduction in (({"size_average": False}, "sum"), ({"reduce": False}, "none"), ({"reduce": True}, "mean")):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            loss = cross_entropy(x, y, **flags)
        torch.testing.assert_close(loss, F.cross_entropy(x, y, reduction=reduction))


X, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((X.long(), Y), {}, TypeError, "floating-point.*int64"),
        ((torch.zeros(()), Y), {}, ValueError, "scalar"),
        ((X, 3), {}, TypeError, "target must be a tensor"),
        ((X, Y.int()), {}, TypeError, "int64.*int32"),
        ((X, Y.float()), {}, TypeError, "int64.*float32"),
        ((X, Y[:3]), {}, ValueError, r"\[4\].*\[3\]"),
        ((X, X.long()), {}, TypeError, "class probabilities"),
        ((X, X), {"ignore_index": 1}, ValueError, "ignore_index"),
        ((X, Y, X[0, :3]), {}, ValueError, r"weight.*\[5\].*\[3\]"),
        ((X, Y, Y[:4]), {}, TypeError, "weight"),
        ((X, Y, [1.0] * 5), {}, TypeError, "weight.*list"),
        ((X, Y), {"ignore_index": 1.0}, TypeError, "ignore_index.*1.0"),
        ((X, Y), {"reduction": "avg"}, ValueError, "none, mean, sum; got 'avg'"),
        ((X, Y), {"label_smoothing": 1.5}, ValueError, "label_smoothing.*1.5"),
        ((X, Y), {"softcap": 0.0}, ValueError, "softcap"),
        ((X, Y), {"logit_scale": math.nan}, ValueError, "logit_scale"),
        ((X, Y), {"z_loss": -1.0}, ValueError, "z_loss"),
        ((X, Y.to("meta")), {}, ValueError, "meta.*cpu"),
    ],
)
def test_errors_name_what_is_wrong(args, options, error, words):
    with pytest.raises(error, match="cross_entropy: .*" + words):
        cross_entropy(*args, **options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="bytes are counted in the interpreter")
@pytest.mark.parametrize(("row", "most"), [(kernel.ROW, 1.05), (0, 1.55)])
def test_forward_and_gradient_move_little_more_than_the_least_bytes(row, most, monkeypatch):
    monkeypatch.setattr(kernel, "ROW", row)
    monkeypatch.setattr(kernel, "WIDE_TURN", 4096)
    x = torch.randn(16, 8200).bfloat16().requires_grad_()
    with fastllm.backend("triton"), count_traffic() as traffic:
        cross_entropy(x, torch.randint(0, 8200, (16,))).backward()
    assert 1.0 <= traffic.total / (2 * x.numel() * x.element_size()) <= most, traffic.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reduction", "weighted"), [("none", True), ("mean", True), ("mean", False), ("sum", False)])
def test_rows_past_what_registers_hold(dtype, reduction, weighted, monkeypatch, poisoned_memory):
    x = (torch.randn(5, 5000, device=DEVICE) * 3).to(dtype)
    y = torch.tensor([0, 4999, -100, 4096, 7], device=DEVICE)
    options = dict(
        weight=torch.rand(5000, device=DEVICE) if weighted else None, label_smoothing=0.1, softcap=4.0, logit_scale=0.5,
        z_loss=0.1, reduction=reduction,
    )  # fmt: skip
    truth, truth_grad = _gradient(cross_entropy_reference, x.double(), y, **options)
    with fastllm.backend("eager"):
        theirs, theirs_grad = _gradient(cross_entropy, x, y, **options)
    monkeypatch.setattr(kernel, "ROW", 0)
    monkeypatch.setattr(kernel, "WIDE_TURN", 1024)
    with fastllm.backend("triton"):
        loss, grad = _gradient(cross_entropy, x, y, **options)
    assert_as_true(loss, truth, theirs, dtype, "loss")
    assert_as_true(grad, truth_grad, theirs_grad, dtype, "gradient")


def test_the_entropy_of_a_row_in_many_blocks(monkeypatch):
    monkeypatch.setattr(logits, "TILE", 64)
    # Each block's maximum is above the one before: what was summed is moved to it every time.
    x = torch.randn(5, 300, device=DEVICE) + torch.linspace(0, 30, 300, device=DEVICE)
    target = torch.randint(300, (5, 1), device=DEVICE)
    out = kernel.RowOutputs(*x.new_empty(2, 5), x.new_empty(3, 5), entropy=x.new_empty(5))
    kernel.forward_rows(Labelled(x[..., None], target, None, Loss(reduction="none")), out)
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=x).entropy())


@pytest.mark.parametrize("upstream", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_upstream_gradient_reaches_ignored_rows(backend, reduction, upstream):
    x, y = torch.randn(4, 10, device=DEVICE), torch.tensor([3, -100, 0, -100], device=DEVICE)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(cross_entropy(x, y, reduction=reduction), x, torch.tensor(upstream, device=DEVICE))
    assert not dx[1::2].any()
    assert not dx[::2].isfinite().any()


@pytest.mark.runs_on("anywhere")
def test_module_is_torchs_with_more():
    module = fastllm.nn.CrossEntropyLoss(
        torch.rand(5), ignore_index=2, label_smoothing=0.1, z_loss=0.1, return_lse=True
    )
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert list(module.state_dict()) == ["weight"]
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 4])
    loss, lse = module(x, y)
    torch.testing.assert_close(lse, torch.logsumexp(x, 1))
    torch.testing.assert_close(
        loss, cross_entropy_reference(x, y, module.weight, ignore_index=2, label_smoothing=0.1, z_loss=0.1)
    )


def test_class_weights_that_need_a_gradient_are_refused_by_the_kernel():
    weight = torch.rand(5, device=DEVICE, requires_grad=True)
    with fastllm.backend("triton"), pytest.raises(fastllm.backends.BackendError, match="weight requires"):
        cross_entropy(X.to(DEVICE), Y.to(DEVICE), weight)


@pytest.mark.parametrize("options", [{}, dict(reduction="none", z_loss=0.1, return_lse=True)])
def test_one_class_index_in_a_vector_is_a_scalars(options, backend):
    x = torch.randn(9, device=DEVICE)
    one = cross_entropy(x, torch.tensor([3], device=DEVICE), **options)
    for function in (cross_entropy, cross_entropy_reference):
        torch.testing.assert_close(one, function(x, torch.tensor(3, device=DEVICE), **options))
    torch.testing.assert_close(cross_entropy_reference(x, torch.tensor([3], device=DEVICE), **options), one)
