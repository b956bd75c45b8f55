"""What is peculiar to linear_log_probs: options against the formula, ignored rows, adapters, precision, errors."""

import pytest
import torch
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm import losses
from fastllm.functional import linear_cross_entropy, linear_cross_entropy_plan, linear_log_probs
from fastllm.ops.cross_entropy import chunks, linear_operator, rows
from fastllm.ops.cross_entropy.products import logits_into

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]


def _call(n=9, d=8, v=33, dtype=torch.float32):
    x = torch.randn(n, d, device=DEVICE, dtype=dtype, requires_grad=True)
    w = torch.randn(v, d, device=DEVICE, dtype=dtype, requires_grad=True)
    return x, w, torch.randint(0, v, (n,), device=DEVICE)


def _formula(x, w, y, *, linear_bias, temperature, softcap, shift, ignore_index):
    """log softmax(softcap * tanh(z / softcap) / temperature) at the targets, and its entropy, in fp64."""
    z = x.double() @ w.double().t()
    if linear_bias is not None:
        z = z + linear_bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    y = torch.cat((y[..., shift:], torch.full_like(y[..., :shift], ignore_index)), -1)
    kept = y != ignore_index
    own = log_p.gather(-1, torch.where(kept, y, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, own, 0), torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0)


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.3, 4, 1.7]),
        "softcap": st.sampled_from([None, 2.0, 5]),
        "shift": st.integers(0, 2),
        "ignore_index": st.sampled_from([-100, 2]),
    }
)


@pytest.mark.parametrize("backend", ["eager", "triton", "native"] if DEVICE.type == "cpu" else ["eager", "triton"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=OPTIONS, bias=st.booleans(), workspace=st.sampled_from([None, 1e-4]), v=st.sampled_from([1, 33]))
def test_it_is_the_formula(backend, options, bias, workspace, v):
    torch.manual_seed(3)
    x, w, y = _call(n=8, v=v)
    y = torch.where(torch.rand(8, device=DEVICE) < 0.3, options["ignore_index"], y).view(2, 4)
    x = x.detach().view(2, 4, -1).requires_grad_()
    b = torch.randn(v, device=DEVICE, requires_grad=True) if bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    with fastllm.backend(backend):
        got = linear_log_probs(x, w, y, linear_bias=b, return_entropy=True, max_workspace_mb=workspace, **options)
        alone = linear_log_probs(x, w, y, linear_bias=b, max_workspace_mb=workspace, **options)
        expected = _formula(x, w, y, linear_bias=b, **options)
        factors = [torch.randn(2, 4, device=DEVICE) for _ in got]
        mine = torch.autograd.grad([(g * f).sum() for g, f in zip(got, factors, strict=True)], leaves)
    truth = torch.autograd.grad([(e * f).sum() for e, f in zip(expected, factors, strict=True)], leaves)
    # The entropy is taken beside.
    torch.testing.assert_close(alone, got[0], rtol=1e-6, atol=1e-6)
    for a, e in zip((*got, *mine), (*expected, *truth), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=4e-6)


@pytest.mark.runs_on("interpreter")
def test_ignored_rows_are_left_out_on_a_cpu_with_the_entropy_too(monkeypatch):
    x, w, y = _call(n=12)
    y[::3] = -100
    seen = []

    def counted(labelled, *rest):
        seen.append(len(labelled.logits))
        return rows.eager_row_losses(labelled, *rest)

    monkeypatch.setitem(rows.ROW_LOSSES, "eager", counted)
    with fastllm.backend("eager"):
        log_probs, entropy = linear_log_probs(x, w, y, return_entropy=True)
        (log_probs + entropy).sum().backward()
    assert seen == [8, 8]
    assert (log_probs[::3] == 0).all()
    assert not torch.signbit(log_probs[::3]).any()
    assert (entropy[::3] == 0).all()
    assert (x.grad[::3] == 0).all()


ON_A_CPU = [("native", None), ("native", 1e-4)] if DEVICE.type == "cpu" else []


@pytest.mark.parametrize(("backend", "workspace"), [("eager", 1e-4), ("triton", None), *ON_A_CPU])
def test_a_class_that_cannot_be_is_as_one_that_is_not_there(backend, workspace):
    """Its logit is -inf, and p log p of it is 0, as are the gradients."""
    x, w, _ = _call(v=34)
    bias, y = torch.randn(34, device=DEVICE), torch.arange(9, device=DEVICE)
    factors = torch.randn(2, 9, device=DEVICE)

    def run(x, w, bias):
        with fastllm.backend(backend):
            return linear_log_probs(x, w, y, linear_bias=bias, return_entropy=True, max_workspace_mb=workspace)

    def loss(found):
        return sum((t * factor).sum() for t, factor in zip(found, factors, strict=True))

    bias[-1] = -torch.inf
    got, expected = run(x, w, bias), run(x, w[:-1], bias[:-1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss(got), (x, w)), torch.autograd.grad(loss(expected), (x, w)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton", "native"] if DEVICE.type == "cpu" else ["eager", "triton"])
def test_nan_for_an_ignored_token_goes_nowhere(backend, frozen):
    x, w, y = _call()
    y[::3] = -100
    leaves = (x,) if frozen else (x, w)
    upstream = torch.randn(9, device=DEVICE)
    clean = torch.where(y == -100, 0, upstream)
    upstream[::3] = torch.nan
    with fastllm.backend(backend):
        for workspace in (None, 1e-4):
            log_probs = linear_log_probs(x, w.detach() if frozen else w, y, max_workspace_mb=workspace)
            got = torch.autograd.grad(log_probs, leaves, upstream, retain_graph=True)
            for mine, theirs in zip(got, torch.autograd.grad(log_probs, leaves, clean), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_16_bit_hidden_states_give_fp32_log_probs_under_autocast_too():
    x, w, y = _call(dtype=torch.bfloat16)
    truth = torch.log_softmax(x.double() @ w.double().t(), -1).gather(-1, y[:, None]).squeeze(-1)
    got = linear_log_probs(x, w, y)
    assert got.dtype == torch.float32
    # The logits are rounded to bf16, at most 2**-8 of 16; the log-probabilities are not rounded again.
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2**-3)
    assert (got != got.bfloat16()).any()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(linear_log_probs(x.float(), w.float(), y), got, rtol=0, atol=0)


def test_an_adapter_on_a_frozen_head_and_a_tied_weight_get_their_gradients():
    x, w, y = _call()
    frozen = w.detach()
    a, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((33, 2), (2, 8)))

    def both(head):
        return torch.autograd.grad(head(x @ torch.eye(8, device=DEVICE), frozen + a @ b, y).sum(), (x, a, b))

    def all_logits(x, w, y):
        return torch.log_softmax(x @ w.t(), -1).gather(-1, y[:, None])

    for mine, theirs in zip(both(linear_log_probs), both(all_logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)

    def tied(head):
        return torch.autograd.grad(head(torch.nn.functional.embedding(y, w), w, y).sum(), w)[0]

    torch.testing.assert_close(tied(linear_log_probs), tied(all_logits), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_heads_logits_are_computed_once_with_the_bits_of_computing_them_twice(dtype):
    x, w, y = _call(dtype=dtype)
    # The loss is in the dtype of x, and its upstream gradient so too.
    head, upstream = w.detach(), torch.randn(len(y), device=DEVICE).to(dtype).float()
    y = torch.where(torch.arange(len(y), device=DEVICE) == 1, -100, y)
    upstream[1] = float("nan")  # of an ignored target, which has no influence
    twice = linear_cross_entropy(x, head, y, reduction="none", recompute=True)
    (expected,) = torch.autograd.grad(twice, x, -upstream.to(dtype))
    log_probs = linear_log_probs(x, head, y)
    for _ in range(2):  # the second time they are computed again
        (got,) = torch.autograd.grad(log_probs, x, upstream, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert linear_cross_entropy_plan(x, head, reduction="none").lane == "2 matmuls, no recompute"
    assert linear_cross_entropy_plan(x, w, reduction="none", max_workspace_mb=1e-4).lane == "4 matmuls, recompute"


@pytest.mark.runs_on("interpreter")  # the extension alone keeps logits, on a CPU
@pytest.mark.parametrize("entropy", [False, True])
def test_logits_that_are_one_chunk_are_computed_once_with_the_bits_of_computing_them_twice(monkeypatch, entropy):
    x, w, y = _call()
    b, y = torch.randn(33, requires_grad=True), torch.where(y % 3 == 0, -100, y)
    computed = []

    def count(x, weight, bias, out):
        computed.append(len(x))
        return logits_into(x, weight, bias, out)

    monkeypatch.setattr(chunks, "logits_into", count)
    with fastllm.backend("native"):
        outputs = linear_log_probs(x, w, y, linear_bias=b, softcap=3.0, temperature=0.7, return_entropy=entropy)
        assert linear_cross_entropy_plan(x, w, reduction="none").lane == "3 matmuls, no recompute"
    outputs = outputs if entropy else (outputs,)
    upstream = [torch.randn(len(y)) for _ in outputs]
    first = torch.autograd.grad(outputs, (x, w, b), upstream, retain_graph=True)
    assert computed == [int((y != -100).sum())]
    again = torch.autograd.grad(outputs, (x, w, b), upstream)
    assert len(computed) > 1
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("ignored", [False, True])
def test_the_fake_operator_knows_the_shape_of_kept_logits(monkeypatch, ignored):
    x, w, y = _call()
    if ignored:
        y[::3] = -100
    calls, forward = [], linear_operator._linear_cross_entropy_fwd

    def remember(*args):
        calls.append([arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args])
        return forward(*args)

    monkeypatch.setattr(linear_operator, "unwatched", lambda *tensors: False)
    monkeypatch.setattr(linear_operator, "_linear_cross_entropy_fwd", remember)
    with fastllm.backend("native"):
        linear_log_probs(x, w, y, max_workspace_mb=64)  # not an ordinary call, which asks no operator of PyTorch
    (args,) = calls
    assert forward(*args)[5].shape == (9, 33)
    torch.library.opcheck(torch.ops.fastllm.linear_cross_entropy_fwd.default, args, test_utils="test_faketensor")


def test_checkpointing_gives_the_same_bits():
    x, w, y = _call()
    plain = torch.autograd.grad(linear_log_probs(x, w, y).exp().sum(), (x, w))
    again = checkpoint(linear_log_probs, x, w, y, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.exp().sum(), (x, w)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_weight_is_the_factor_at_its_place_also_with_a_shift():
    x, w, y = _call(n=6)
    x, y, weight = x.view(2, 3, -1), y.view(2, 3), torch.tensor([[9.0, 2.0, 0.0], [9.0, 0.5, 3.0]], device=DEVICE)
    plain = linear_log_probs(x, w, y, shift=1)
    expected = plain * weight
    torch.testing.assert_close(linear_log_probs(x, w, y, shift=1, token_weight=weight), expected)
    mean = linear_cross_entropy(x, w, y, shift=1, token_weight=weight)
    torch.testing.assert_close(mean, -expected.sum() / weight[:, :2].sum())
    with fastllm.backend("eager"):
        torch.testing.assert_close(linear_log_probs(x, w, y, shift=1, token_weight=weight), expected)


def test_packed_rows_give_each_sequence_what_it_has_alone():
    x, w, y = _call(n=9)
    cu_seqlens = torch.tensor([0, 4, 5, 9], device=DEVICE)
    targets = y.clone()
    targets[cu_seqlens[:-1]] = -100
    packed = linear_log_probs(x, w, targets, shift=1)
    rows, there = (losses.unpack(t, cu_seqlens) for t in (packed, torch.ones(9, device=DEVICE)))
    bounds = cu_seqlens.tolist()
    for row, mask, first, end in zip(rows, there, bounds[:-1], bounds[1:], strict=True):
        alone = linear_log_probs(x[first:end], w, y[first:end], shift=1)
        torch.testing.assert_close(row[: end - first], alone)
        assert mask.tolist() == [1.0] * (end - first) + [0.0] * (4 - end + first)
    sums = losses.sequence_log_probs(rows, there)
    torch.testing.assert_close(sums.sum(), packed.sum())
    # No gradient crosses a border: that of one sequence is 0 for the others' tokens.
    (grad,) = torch.autograd.grad(sums[2], x)
    assert (grad[:5] == 0).all()
    assert (grad[5:8] != 0).any(-1).all()
    torch.testing.assert_close(losses.unpack(packed[None], cu_seqlens.int(), max_seqlen=6)[:, :4], rows)


@pytest.mark.parametrize("temperature", [0, None, -1.0, float("inf"), float("nan"), "1", torch.tensor(1.0)])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="linear_log_probs: temperature must be"):
        linear_log_probs(*_call(), temperature=temperature)


def test_errors_name_the_function_and_the_argument():
    x, w, y = _call()
    for message, call in (
        ("linear_log_probs: input must end in", lambda: linear_log_probs(x[:, :5], w, y)),
        ("linear_log_probs: target must be of shape", lambda: linear_log_probs(x, w, y[:5])),
        ("linear_log_probs: softcap must be positive", lambda: linear_log_probs(x, w, y, softcap=-1.0)),
        ("linear_log_probs: shift must not be negative", lambda: linear_log_probs(x, w, y, shift=-1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"linear_log_probs: linear_weight is torch\.float16"):
        linear_log_probs(x, w.half(), y)
    for options in (dict(softcap="1"), dict(shift=1.5), dict(shift="1"), dict(max_workspace_mb="1")):
        with pytest.raises(TypeError, match=f"linear_log_probs: {next(iter(options))} must be an? "):
            linear_log_probs(x, w, y, **options)
    if DEVICE.type == "cpu":
        with pytest.raises(IndexError, match=r"^linear_log_probs: target \d+ at position \[0\] is out of range"):
            linear_log_probs(x, w, y + 33)


@pytest.mark.runs_on("interpreter")  # the extension alone keeps logits, on a CPU
def test_fake_tensors_leave_no_logits_behind():
    """The logits that the extension keeps for the backward would be looked at there."""
    with FakeTensorMode():
        x, w, y = _call()
        grads = torch.autograd.grad(linear_log_probs(x, w, y).sum(), (x, w))
    assert [g.shape for g in grads] == [x.shape, w.shape]
