"""linear_kl_div against the papers' formulas by PyTorch's own operators in fp64; memory, orders, transforms, errors."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import backend_fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm.bench.memory import peak
from fastllm.functional import linear_kl_div
from fastllm.ops.cross_entropy import kl_chunks

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]


def _leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def _call(n=9, d=8, v=33, wider=6, dtype=torch.float32):
    return tuple(_leaf(*shape, dtype=dtype) for shape in ((n, d), (v, d), (n, wider), (v, wider)))


def _oracle(student, teacher, *, kept, direction, beta, temperature, reduction):
    """As in Hinton et al. and Agarwal et al., by torch's KL divergence, of all the logits in fp64."""
    log_q, log_p = (F.log_softmax(z.double() / temperature, -1) for z in (student, teacher))

    def kl(log_a, log_b):  # KL(a || b) of each row
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if direction == "jsd":
        log_m = torch.logsumexp(torch.stack((log_p + math.log(beta), log_q + math.log(1 - beta))), 0)
        rows = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    else:
        rows = kl(log_p, log_q) if direction == "forward" else kl(log_q, log_p)
    rows = torch.where(kept, temperature**2 * rows, 0)
    return rows if reduction == "none" else rows.sum() / (kept.sum() if reduction == "mean" else 1)


OPTIONS = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["forward", "reverse", "jsd"]),
        "beta": st.sampled_from([0.5, 0.1, 0.9]),
        "temperature": st.sampled_from([1.0, 2, 0.5]),
        "reduction": st.sampled_from(["none", "mean", "sum"]),
    }
)

# What serves by default, and PyTorch's operators, which serve where there is no extension.
backend = backend_fixture("auto", "eager")


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    options=OPTIONS, teacher=st.sampled_from(["layer", "frozen", "logits"]), bias=st.booleans(),
    workspace=st.sampled_from([None, 1e-3]), some=st.booleans(), v=st.sampled_from([1, 2, 33]),
)  # fmt: skip
def test_it_is_the_formula(backend, options, teacher, bias, workspace, some, v):
    torch.manual_seed(3)
    x, w, tx, tw = _call(n=8, v=v)
    x = x.detach().view(2, 4, -1).requires_grad_()
    tx = tx.detach().view(2, 4, -1).requires_grad_(teacher == "layer")
    tw.requires_grad_(teacher == "layer")
    b, tb = (_leaf(v), _leaf(v).detach()) if bias else (None, None)
    target = torch.tensor([[1, -100, 0, 3], [-100, 5, 5, 5]], device=DEVICE) if some else None
    kept = torch.ones(2, 4, dtype=torch.bool, device=DEVICE) if target is None else target != -100
    student = F.linear(x.double(), w.double(), None if b is None else b.double())
    logits = F.linear(tx.double(), tw.double(), None if tb is None else tb.double())
    given_logits = logits.float().detach().requires_grad_()
    if teacher == "logits":
        got = linear_kl_div(x, w, given_logits, target=target, linear_bias=b, max_workspace_mb=workspace, **options)
        logits = given_logits
    else:
        got = linear_kl_div(
            x, w, tx, tw, target=target, linear_bias=b, teacher_bias=tb, max_workspace_mb=workspace, **options
        )
    expected = _oracle(student, logits, kept=kept, **options)
    leaves = [t for t in (x, w, b, *((given_logits,) if teacher == "logits" else (tx, tw))) if t is not None]
    leaves = [t for t in leaves if t.requires_grad]
    factor = torch.randn(got.shape, device=DEVICE)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    mine = torch.autograd.grad((got * factor).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad((got * factor).sum(), leaves)
    truth = torch.autograd.grad((expected * factor).sum(), leaves)
    for a, second, e in zip(mine, again, truth, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(a, second, rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_cached_probabilities_are_taken_as_they_are(backend, direction):
    x, w, *_ = _call()
    p = torch.zeros(9, 33, device=DEVICE)
    values, indices = torch.softmax(torch.randn(9, 33, device=DEVICE), -1).topk(5)
    p.scatter_(1, indices, values)
    q = torch.softmax(F.linear(x, w).double() / 2, -1)
    if direction == "forward":
        rows = (values * (values.log() - q.gather(1, indices).log())).sum(1)
    else:
        m = 0.3 * p + 0.7 * q
        rows = 0.3 * (values * (values.log() - m.gather(1, indices).log())).sum(1) + 0.7 * (q * (q / m).log()).sum(1)
    truth = 4 * rows.mean()
    got = linear_kl_div(
        x, w, values, teacher_indices=indices, direction=direction, beta=0.3, temperature=2.0, max_workspace_mb=1e-3
    )
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(truth, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_of_itself_it_is_0_and_flat(backend, direction):
    x, w, *_ = _call()
    loss = linear_kl_div(x, w, x.detach(), w.detach(), direction=direction, reduction="none")
    assert (loss.abs() < 1e-6).all()
    for grad in torch.autograd.grad(loss.sum(), (x, w)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("direction", "finite"), [("forward", True), ("jsd", True), ("reverse", False)])
def test_classes_that_the_teacher_rules_out(backend, direction, finite):
    x, w, *_ = _call()
    logits = torch.randn(9, 33, device=DEVICE)
    logits[:, ::2] = -math.inf
    loss = linear_kl_div(x, w, logits, direction=direction)
    assert loss.isfinite() == finite
    if finite:
        grads = torch.autograd.grad(loss, (x, w))
        kept = torch.where(logits == -math.inf, -1e9, logits)
        expected = linear_kl_div(x, w, kept, direction=direction)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert loss == math.inf


@pytest.mark.parametrize(("direction", "reduction"), [("forward", "none"), ("reverse", "mean"), ("jsd", "sum")])
def test_second_order(direction, reduction):
    inputs = _call(n=2, d=1, v=2, wider=1, dtype=torch.float64)

    def function(*args):
        return linear_kl_div(*args, direction=direction, beta=0.3, temperature=1.5, reduction=reduction, softcap=3.0)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_operators_are_well_formed():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastllm":
                seen.append((func, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
            return func(*args, **(kwargs or {}))

    with Recorder():
        linear_kl_div(*_call()).backward()
        linear_kl_div(*_call(), reduction="none", direction="jsd").sum().backward()
    assert {func._schema.name for func, _ in seen} == {
        f"fastllm::linear_kl_div_{name}" for name in ("fwd", "bwd", "scale_")
    }
    for func, args in seen:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_and_what_is_called_without_them_give_the_same_bits(reduction):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x, w, tx, tw = _call()
    target = torch.where(torch.rand(len(x), device=DEVICE) < 0.3, -100, 1)
    for call, options in (((x, w, tx.detach(), tw.detach()), {}), ((x, w, tx, tw), {"target": target})):
        found = []
        for mode in (contextlib.nullcontext(), Watch()):
            with mode:
                loss = linear_kl_div(*call, reduction=reduction, **options)
                leaves = [t for t in call if t.requires_grad]
                # The second time what the forward left is gone.
                orders = [torch.autograd.grad(3 * loss.sum(), leaves, retain_graph=True) for _ in range(2)]
            found.append((loss, *orders[0], *orders[1]))
        for alone, watched in zip(*found, strict=True):
            torch.testing.assert_close(alone, watched, rtol=0, atol=0)


def test_no_rows_have_no_loss(backend):
    x, w, tx, tw = _call(n=0)
    assert linear_kl_div(x, w, tx, tw, reduction="none").shape == (0,)
    loss = linear_kl_div(x, w, tx, tw, reduction="sum")
    grads = torch.autograd.grad(loss, (x, w, tx, tw))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_functional_transforms_and_checkpoints():
    x, w, tx, tw = (t.detach() for t in _call())
    x.requires_grad_()
    expected = torch.autograd.grad(linear_kl_div(x, w, tx, tw), x)[0]
    by_grad = torch.func.grad(linear_kl_div)(x.detach(), w, tx, tw)
    rows = torch.func.vmap(linear_kl_div, in_dims=(0, None, 0, None))(x[:, None], w, tx[:, None], tw)
    kept = torch.autograd.grad(checkpoint(linear_kl_div, x, w, tx, tw, use_reentrant=False), x)[0]
    torch.testing.assert_close(by_grad, expected)
    torch.testing.assert_close(rows, linear_kl_div(x, w, tx, tw, reduction="none"))
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_a_narrow_teacher_and_autocast():
    x, w, tx, tw = _call()
    rounded = tx.bfloat16(), tw.bfloat16()
    # The teacher's logits are rounded once more.
    torch.testing.assert_close(
        linear_kl_div(x, w, *rounded), linear_kl_div(x, w, *(t.float() for t in rounded)), rtol=2**-8, atol=0
    )
    with torch.autocast(DEVICE.type, torch.bfloat16):
        auto = linear_kl_div(x, w, tx, tw)
    assert auto.dtype == torch.float32
    expected = linear_kl_div(*(t.bfloat16() for t in (x, w, tx, tw)))
    torch.testing.assert_close(auto, expected, rtol=0, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (x, w, tx, tw)) for loss in (auto, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("v", [3, 64, 133])
def test_a_teacher_of_another_dtype_gives_the_same_bits(backend, v, temperature):
    """The extension takes rows of two dtypes in other code than rows of one."""
    x, w = _leaf(9, 8), _leaf(v, 8)
    narrow = _leaf(9, v).detach().bfloat16()
    narrow[2, 1:], narrow[3, 0] = -math.inf, -math.inf
    found = []
    for teacher in (narrow, narrow.float()):
        loss = linear_kl_div(x, w, teacher, temperature=temperature, reduction="none")
        found.append((loss, *torch.autograd.grad(loss.sum(), (x, w))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rows_are_the_same_bits_in_slices_of_any_size(monkeypatch):
    call = tuple(t.detach() for t in _call(n=64, v=500))
    with fastllm.backend("eager"):
        whole = linear_kl_div(*call, reduction="none", direction="jsd")
        monkeypatch.setitem(kl_chunks.SLICE, DEVICE.type, 1500)
        torch.testing.assert_close(linear_kl_div(*call, reduction="none", direction="jsd"), whole, rtol=0, atol=0)


@pytest.mark.runs_on("interpreter")
def test_memory_is_a_chunk_and_positions_that_do_not_count_cost_nothing(monkeypatch):
    x, w, tx, tw = _call(n=1024, d=16, v=8000)
    tx, tw = tx.detach(), tw.detach()
    gradients = 4 * (x.numel() + w.numel())
    linear_kl_div(x[:64], w, tx[:64], tw).backward()  # first-call allocations
    x.grad = w.grad = None
    mine = peak(lambda: linear_kl_div(x, w, tx, tw, max_workspace_mb=4).backward())
    # 31 MiB of logits, five times, for the plain way.
    assert mine <= gradients + (4 + 24) * 2**20
    seen = []
    real = kl_chunks.logits_into
    monkeypatch.setattr(kl_chunks, "logits_into", lambda rows, *rest: seen.append(len(rows)) or real(rows, *rest))
    target = torch.where(torch.arange(1024) % 8 == 0, 1, -100)
    linear_kl_div(x, w, tx, tw, target=target)
    assert sum(seen) == 2 * 128


def _wrong():
    x, w, tx, tw = (t.detach() for t in _call())
    logits, k = torch.randn(9, 33, device=DEVICE), torch.zeros(9, 3, dtype=torch.int64, device=DEVICE)
    p = torch.full((9, 3), 0.3, device=DEVICE)
    ignored = torch.full((9,), -100, device=DEVICE)
    return {
        "linear_kl_div: linear_weight must be .classes, features.": (ValueError, (x[:, :5], w, tx, tw), {}),
        "linear_kl_div: the teacher has another vocabulary: teacher_weight has 32 classes, linear_weight 33": (
            ValueError, (x, w, tx, tw[:32]), {}
        ),
        "must be logits of linear_weight's 33 classes": (ValueError, (x, w, logits[:, :30]), {}),
        "teacher_input must have input's positions": (ValueError, (x, w, tx[:5], tw), {}),
        "direction must be one of": (ValueError, (x, w, tx, tw), dict(direction="back")),
        "beta must be between 0 and 1": (ValueError, (x, w, tx, tw), dict(direction="jsd", beta=1.0)),
        "temperature must be a number": (TypeError, (x, w, tx, tw), dict(temperature=None)),
        "beta must be a number": (TypeError, (x, w, tx, tw), dict(direction="jsd", beta=None)),
        "max_workspace_mb must be a number": (TypeError, (x, w, tx, tw), dict(max_workspace_mb="1")),
        "temperature must be positive": (ValueError, (x, w, tx, tw), dict(temperature=0.0)),
        "softcap must be positive": (ValueError, (x, w, tx, tw), dict(softcap=-1.0)),
        "reduction must be one of": (ValueError, (x, w, tx, tw), dict(reduction="batchmean")),
        "max_workspace_mb must be positive": (ValueError, (x, w, tx, tw), dict(max_workspace_mb=0)),
        "target must be of shape": (ValueError, (x, w, tx, tw), dict(target=ignored[:4])),
        "target must hold integers": (TypeError, (x, w, tx, tw), dict(target=ignored.float())),
        "teacher_weight is torch.float16, teacher_input torch.float32": (TypeError, (x, w, tx, tw.half()), {}),
        "teacher_input must be a floating-point tensor": (TypeError, (x, w, k), {}),
        "'reverse' is infinite": (ValueError, (x, w, p), dict(teacher_indices=k, direction="reverse")),
        "teacher_indices must be int64 or int32": (ValueError, (x, w, p), dict(teacher_indices=k[:, :2])),
    } | ({
        "no position counts": (ValueError, (x, w, tx, tw), dict(target=ignored)),
        "teacher_indices must be .*got from 33 to 33": (IndexError, (x, w, p), dict(teacher_indices=k + 33)),
        "teacher_indices must be .*got from -1 to -1": (IndexError, (x, w, p), dict(teacher_indices=k - 1)),
        "must hold probabilities where": (ValueError, (x, w, -p), dict(teacher_indices=k)),
    } if DEVICE.type == "cpu" else {})  # fmt: skip


def test_bad_input_is_named():
    for message, (kind, args, options) in _wrong().items():
        with pytest.raises(kind, match=message):
            linear_kl_div(*args, **options)
