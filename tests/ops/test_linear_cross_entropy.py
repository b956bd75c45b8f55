"""What is peculiar to linear_cross_entropy: memory, precision over many chunks, lanes, modules, errors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_as_true, backend_fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastllm
from fastllm.bench.memory import peak
from fastllm.functional import cross_entropy, linear_cross_entropy, linear_cross_entropy_plan
from fastllm.ops.cross_entropy import chunks
from fastllm.ops.cross_entropy.call import Chunking
from fastllm.ops.cross_entropy.chunks import LayerLoss, in_chunks
from fastllm.ops.cross_entropy.linear import linear_cross_entropy_reference
from fastllm.ops.cross_entropy.loss import Loss
from fastllm.ops.cross_entropy.operator import LossGradients
from fastllm.ops.cross_entropy.products import WIDENED_COLUMNS, Layer
from fastllm.ops.cross_entropy.rows import Extras

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

backend = backend_fixture("eager", "triton")


def _call(n=9, d=8, v=33, dtype=torch.float32, ignored=0.25):
    x = torch.randn(n, d, device=DEVICE, dtype=dtype, requires_grad=True)
    w = torch.randn(v, d, device=DEVICE, dtype=dtype, requires_grad=True)
    y = torch.where(torch.rand(n, device=DEVICE) < ignored, -100, torch.randint(0, v, (n,), device=DEVICE))
    return x, w, y


OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "label_smoothing": st.sampled_from([0.0, 0.2, 1.0]),
        "softcap": st.sampled_from([None, 3.0]),
        "logit_scale": st.sampled_from([1.0, -0.5]),
        "z_loss": st.sampled_from([0.0, 0.1]),
        "shift": st.integers(0, 3),
        "max_workspace_mb": st.sampled_from([None, 1e-5, 1e-3]),
        "recompute": st.booleans(),
        "return_lse": st.booleans(),
        "return_accuracy": st.booleans(),
        "return_entropy": st.booleans(),
        "max_targets": st.sampled_from([None, 8, 100]),
        "ignore_index": st.sampled_from([-100, 2]),
    }
)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=OPTIONS, weighted=st.booleans(), tokens=st.booleans(), bias=st.booleans(), v=st.sampled_from([1, 3, 33]))
def test_options_together(backend, options, weighted, tokens, bias, v):
    torch.manual_seed(3)
    x, w, _ = _call(n=8, v=v)
    y = torch.randint(0, v, (2, 4), device=DEVICE)
    if weighted:
        options["weight"] = torch.rand(v, device=DEVICE)
    if tokens:
        options["token_weight"] = torch.rand(2, 4, device=DEVICE)
    leaves = [x, w]
    if bias:
        options["linear_bias"] = torch.randn(v, device=DEVICE, requires_grad=True)
        leaves.append(options["linear_bias"])
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with fastllm.backend(backend):
            out = function(x.view(2, 4, 8), w, y, **options)
            outs = out if isinstance(out, tuple) else (out,)
            given = [o for o in outs if o.requires_grad]
            upstream = [torch.linspace(0.5, 2, o.numel(), device=DEVICE).view(o.shape) for o in given]
            results.append([*outs, *torch.autograd.grad(given, leaves, upstream)])
    for a, b in zip(*results, strict=True):
        # PyTorch's own tolerance. At AVX-512 the two differ by at most rtol and 7e-7, where atol allows 1e-5.
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none before 2.13")
def test_equals_torchs_own(backend):
    x, w, y = _call()
    weight = torch.rand(33, device=DEVICE)
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}, {"weight": weight}):
        mine, theirs = (f(x, w, y, **options) for f in (linear_cross_entropy, F.linear_cross_entropy))
        torch.testing.assert_close(mine, theirs)
        for a, b in zip(
            torch.autograd.grad(mine.sum(), (x, w)), torch.autograd.grad(theirs.sum(), (x, w)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"max_workspace_mb": 1e-4}, {"token_weight": True}])
def test_a_mean_over_classes_of_no_weight_is_nan_whatever_smoothing_adds(backend, options):
    x, w, _ = _call(n=4, v=5)
    y = torch.tensor([1, 1, -100, 1], device=DEVICE)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], device=DEVICE)
    if "token_weight" in options:
        options = {"token_weight": torch.rand(4, device=DEVICE)}
    for smoothing in (0.0, 0.1, 1.0):
        for function in (linear_cross_entropy, linear_cross_entropy_reference):
            with fastllm.backend(backend):
                loss = function(x, w, y, weight=weight, label_smoothing=smoothing, **options)
                dx, _ = torch.autograd.grad(loss, (x, w))
            assert loss.isnan()
            assert not dx[y != -100].isfinite().any()
            assert (dx[y == -100] == 0).all()


def test_none_has_the_right_gradient_for_any_upstream(backend):
    x, w, y = _call()
    upstream = torch.randn(9, device=DEVICE)
    mine = torch.autograd.grad(linear_cross_entropy(x, w, y, reduction="none", max_workspace_mb=1e-4), (x, w), upstream)
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(x, w), y, reduction="none"), (x, w), upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_retain_graph_and_both_lanes_give_the_same_bits(backend, dtype):
    x, w, y = _call(dtype=dtype)
    grads = []
    for recompute in (False, True):
        loss = linear_cross_entropy(x, w, y, recompute=recompute, max_workspace_mb=1e-4)
        first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0, device=DEVICE).to(dtype), retain_graph=True)
        grads.append([g.clone() for g in first])
        for g in first:
            g.zero_()
        grads.append(torch.autograd.grad(loss, (x, w), torch.tensor(3.0, device=DEVICE).to(dtype)))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.equal(a, b)


def test_under_compile_and_functional_grad(backend):
    x, w, y = _call()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w), y), (x, w))
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for got in (
        torch.autograd.grad(compiled(x, w, y), (x, w)),
        torch.func.grad(linear_cross_entropy, argnums=(0, 1))(x.detach(), w.detach(), y),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_frozen_parts_get_nothing_and_cost_nothing(backend):
    x, w, y = _call()
    linear_cross_entropy(x.detach(), w, y).backward()
    assert x.grad is None
    assert w.grad is not None
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w), y), w)[0]
    torch.testing.assert_close(w.grad, expected)


def test_all_ignored_is_nan_with_zero_gradients(backend):
    x, w, _ = _call()
    loss = linear_cross_entropy(x, w, torch.full((9,), -100, device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()


def test_under_autocast(backend):
    x, w, y = _call()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mine = linear_cross_entropy(x, w, y, max_workspace_mb=1e-4)
        theirs = F.cross_entropy(F.linear(x, w), y)
    assert mine.dtype == theirs.dtype == torch.float32
    # Measured on a CPU: 5e-7, and 1e-3 below. On a GPU the two products may round a logit to two bf16 numbers.
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    mine.backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, torch.autograd.grad(theirs, w)[0], rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_dw_over_many_chunks_is_as_good_as_over_one(backend):
    x, w, y = _call(n=2048, d=16, v=256, dtype=torch.bfloat16, ignored=0.0)
    truth = torch.autograd.grad(linear_cross_entropy_reference(x.double(), w.double(), y), w)[0].double()
    with fastllm.backend(backend):
        row = linear_cross_entropy_plan(x, w, max_workspace_mb=1000).workspace_bytes / 2048
        few = 16 * row / 2**20  # 128 chunks of 16 rows
        assert linear_cross_entropy_plan(x, w, max_workspace_mb=few).chunks == 128
        errors = []
        for megabytes in (1000, few):
            (dw,) = torch.autograd.grad(linear_cross_entropy(x, w, y, max_workspace_mb=megabytes), w)
            errors.append((dw.double() - truth).norm() / truth.norm())
    assert errors[1] <= 1.2 * errors[0]


class _Sizes(TorchDispatchMode):
    """Notes the (shape, dtype) of every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {(tuple(t.shape), t.dtype) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize(("workspace", "held"), [(None, False), (0.3, True)])
def test_one_chunk_holds_no_second_dw_in_fp32(backend, workspace, held):
    x, w, y = _call(n=64, d=128, v=2 * WIDENED_COLUMNS, dtype=torch.bfloat16)
    call = LayerLoss(y, None, None, Loss(), Chunking(workspace, None, False, False), backend, "linear_cross_entropy")
    upstream = LossGradients(torch.full((64,), 1 / 64, device=DEVICE))
    with torch.no_grad(), _Sizes() as sizes:
        *_, dw, _ = in_chunks(Layer(x, w, None), call, upstream, (False, True, False), Extras())
    assert dw.dtype == (torch.float32 if held else torch.bfloat16)
    assert ((tuple(w.shape), torch.float32) in sizes.seen) == held


@pytest.mark.skipif(DEVICE.type == "cuda", reason="measures the process on CPU")
def test_memory_stays_within_the_workspace():
    x, w, y = _call(n=2048, d=64, v=20000, ignored=0.0)
    gradients = 4 * (x.numel() + w.numel())
    linear_cross_entropy(x, w, y, max_workspace_mb=8).backward()  # first-call allocations
    x.grad = w.grad = None
    mine = peak(lambda: linear_cross_entropy(x, w, y, max_workspace_mb=8).backward())
    x.grad = w.grad = None
    # 156 MiB of logits, twice, for the plain way.
    assert mine <= gradients + 8 * 2**20 + 16 * 2**20


@pytest.mark.parametrize("max_targets", [None, 8, 20])
def test_ignored_rows_cost_nothing(backend, max_targets):
    """Without max_targets on CPU alone: on CUDA how many there are is known on the device only."""
    x, w, y = _call(n=64)
    y = torch.where(torch.arange(64, device=DEVICE) % 8 == 0, 3, -100)
    seen = []
    real = chunks.ROW_LOSSES[backend]

    def counted(labelled, *rest):
        seen.append(len(labelled.logits))
        return real(labelled, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.ROW_LOSSES, backend, counted)
        loss = linear_cross_entropy(x, w, y, max_targets=max_targets)
    assert sum(seen) == (8 if DEVICE.type == "cpu" else max_targets or 64)
    expected = F.cross_entropy(F.linear(x, w), y)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device-side assert ends the process's use of the GPU")
def test_more_targets_than_were_promised(backend):
    x, w, y = _call(n=64, ignored=0.0)
    with pytest.raises(ValueError, match="64 targets count, more than max_targets 63"):
        linear_cross_entropy(x, w, y, max_targets=63)


def test_the_way_of_a_gpu_leaves_out_ignored_rows_without_knowing_them(monkeypatch):
    y = torch.tensor([-100, 4, -100, 2, 0, -100], device=DEVICE)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    at_most = {n: Chunking(None, n, skip_ignored=True, for_entropy=False) for n in (2, 3, 4)}
    assert chunks.rows_to_compute(y, -100, at_most[4]).tolist() == [1, 3, 4, 0]
    assert chunks.rows_to_compute(y, -100, at_most[3]).tolist() == [1, 3, 4]
    with pytest.raises(RuntimeError, match="more targets count than max_targets"):
        chunks.rows_to_compute(y, -100, at_most[2])


def test_accuracy_and_entropy_are_what_they_say(backend):
    w = torch.eye(4, device=DEVICE)
    x = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [3, 0, 3, 0], [0, 0, 0, 0], [0, 9, 0, 0]], device=DEVICE)
    y = torch.tensor([0, 0, 2, -100, 1], device=DEVICE)
    loss, accuracy, entropy = linear_cross_entropy(x, w, y, return_accuracy=True, return_entropy=True)
    torch.testing.assert_close(loss, F.cross_entropy(x, y))
    assert accuracy.tolist() == [1, 0, 1, 0, 1]  # a tie is no miss
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=x).entropy())
    loss, accuracy = linear_cross_entropy(x, w, y, return_accuracy=True, shift=1)
    assert accuracy.tolist() == [1, 0, 0, 1, 0]


def test_an_entropy_bonus_has_its_gradient(backend):
    """As in reinforcement learning: the loss less the entropy, in one backward, with certain rows among them."""
    x, w, y = _call(n=12, v=40)
    x = (x * torch.linspace(0, 30, 12, device=DEVICE)[:, None]).detach().requires_grad_()
    loss, entropy = linear_cross_entropy(x, w, y, return_entropy=True, max_workspace_mb=1e-3)
    mine = torch.autograd.grad(loss - 0.1 * entropy.mean(), (x, w))
    logits = F.linear(x, w)
    theirs = F.cross_entropy(logits, y) - 0.1 * torch.distributions.Categorical(logits=logits).entropy().mean()
    for a, b in zip(mine, torch.autograd.grad(theirs, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fp16_gradients_survive_a_mean_over_many_tokens():
    x, w, y = _call(n=512, dtype=torch.float16, ignored=0.0)
    loss = linear_cross_entropy(x, w, y)
    got = torch.autograd.grad(loss, x, torch.tensor(2.0**14, dtype=torch.float16, device=DEVICE))[0]
    z = F.linear(x, w)
    theirs = torch.autograd.grad(F.cross_entropy(z, y), x, torch.tensor(2.0**14, dtype=torch.float16, device=DEVICE))[0]
    wide, wide_w = x.detach().double().requires_grad_(), w.detach().double()
    truth = torch.autograd.grad(F.cross_entropy(F.linear(wide, wide_w), y), wide)[0] * 2.0**14
    assert_as_true(got, truth, theirs, torch.float16, "dx")


def test_modules(backend):
    x, _, y = _call()
    module = fastllm.nn.LinearCrossEntropyLoss(8, 33, bias=True, z_loss=0.1, shift=1).to(DEVICE)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}
    logits = module.linear(x)
    torch.testing.assert_close(module(x, y), cross_entropy(logits[:-1], y[1:], z_loss=0.1))
    assert module.plan(x).chunks == 1
    head = fastllm.nn.LinearCrossEntropyHead(8, 33, bias=False).to(DEVICE)
    assert set(head.state_dict()) == {"weight"}
    torch.testing.assert_close(head(x, y, label_smoothing=0.1), F.cross_entropy(head(x), y, label_smoothing=0.1))


def test_no_features_leave_the_bias(backend):
    x, w, b = (torch.zeros(n, device=DEVICE, requires_grad=True) for n in ((4, 0), (5, 0), (5,)))
    with torch.no_grad():
        b.copy_(torch.arange(5.0))
    y = torch.arange(4, device=DEVICE)
    loss = linear_cross_entropy(x, w, y, linear_bias=b)
    torch.testing.assert_close(loss, F.cross_entropy(b.expand(4, 5), y))
    loss.backward()
    assert x.grad.shape == (4, 0)
    torch.testing.assert_close(b.grad, b.softmax(0) - 0.25 * (torch.arange(5, device=DEVICE) < 4))


X, W, Y = torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((X.long(), W, Y), {}, TypeError, "input.*int64"),
        ((X, W, Y.int()), {}, TypeError, "target.*int32"),
        ((X, W, torch.zeros(4, 5)), {"shift": 1}, ValueError, "shift"),
        ((X, W.double(), Y), {}, TypeError, "linear_weight is torch.float64"),
        ((X, W[:, :3], Y), {}, ValueError, "3 features"),
        ((X, W[0], Y), {}, ValueError, "linear_weight"),
        ((X, W, Y[:3]), {}, ValueError, r"target.*\[4\].*\[3\]"),
        ((X, W, Y), {"linear_bias": [1.0] * 5}, TypeError, "linear_bias.*list"),
        ((X, W, Y), {"weight": [1.0] * 5}, TypeError, "weight.*list"),
        ((X, W, Y), {"ignore_index": 1.0}, TypeError, "ignore_index.*1.0"),
        ((X, W, Y), {"linear_bias": X[0]}, ValueError, r"linear_bias.*\[5\]"),
        ((X, W, Y), {"weight": X[0]}, ValueError, "weight"),
        ((X, W, Y), {"token_weight": X}, ValueError, "token_weight"),
        ((X, W, Y), {"shift": -1}, ValueError, "shift.*-1"),
        ((X, W, Y), {"max_workspace_mb": 0}, ValueError, "max_workspace_mb"),
        ((X, W, Y), {"max_targets": 0}, ValueError, "max_targets.*0"),
        ((X, W, torch.zeros(4, 5)), {"return_entropy": True}, ValueError, "return_entropy"),
        ((X, W, Y), {"reduction": "avg"}, ValueError, "avg"),
        ((X, W, Y), {"softcap": -1.0}, ValueError, "softcap"),
        ((X, W, Y.to("meta")), {}, ValueError, "meta"),
        ((X, W, Y + 5), {}, IndexError, r"target 5 at position \[0\].*\[0, 5\)"),
        ((X, W, Y - 1), {}, IndexError, "target -1"),
    ],
)
def test_errors_name_what_is_wrong(args, options, error, words):
    with pytest.raises(error, match=f"linear_cross_entropy: .*{words}"):
        linear_cross_entropy(*args, **options)
