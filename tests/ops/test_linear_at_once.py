"""Linear losses whose logits are one chunk, by one call of the extension: the chunks' bits, and who is served."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm
from fastllm.extension import load as extension
from fastllm.functional import linear_cross_entropy, linear_log_probs
from fastllm.ops.cross_entropy import at_once, linear, linear_gradients, linear_operator, log_probs, ordinary_linear

pytestmark = [
    pytest.mark.runs_on("interpreter"),
    pytest.mark.cpu_level,
    pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler"),
]
N, D, V = 9, 12, 37
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
NAMES = ("mean", "sum", "rows", "frozen", "every_option", "log_probs", "log_probs_frozen", "log_probs_entropy")


@pytest.fixture
def served(monkeypatch):
    """How often one call of the extension served."""
    seen, real = [], at_once.linear_rows

    def remember(*args):
        outputs = real(*args)
        seen.append(outputs[0])
        return outputs

    for module in (at_once, ordinary_linear):
        monkeypatch.setattr(module, "linear_rows", remember)
    return seen


def _without(monkeypatch, replaced, how):
    """Ordinary calls take the way of all others, where ``replaced`` of forward and backward is ``how``."""
    for module in (linear, log_probs):
        monkeypatch.setattr(module, "ordinary_linear_loss", lambda *args: None)
    for module in (linear_operator, linear_gradients):
        if hasattr(module, replaced):
            monkeypatch.setattr(module, replaced, how)


def _tensors(dtype, rows=N):
    torch.manual_seed(0)
    x, w = torch.randn(rows, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    return x, w, torch.randint(V, (rows,))


def _outputs(name, x, w, y):
    options = dict(softcap=3.0, logit_scale=0.7, z_loss=0.1, label_smoothing=0.2)
    if name in ("mean", "sum"):
        return (linear_cross_entropy(x, w, y, reduction=name),)
    if name == "rows":
        return (linear_cross_entropy(x, w, y, reduction="none"),)
    if name == "frozen":
        return (linear_cross_entropy(x, w.detach(), y, reduction="none"),)
    if name == "every_option":
        return linear_cross_entropy(x, w, y, return_lse=True, return_accuracy=True, return_entropy=True, **options)
    if name == "log_probs_entropy":
        return linear_log_probs(x, w, y, temperature=0.7, softcap=3.0, return_entropy=True)
    return (linear_log_probs(x, w.detach() if name.endswith("frozen") else w, y, temperature=0.7),)


def _all(name, dtype, y=None):
    """Outputs, and gradients twice: the second time nothing that the forward left is there any more."""
    x, w, target = _tensors(dtype, N if y is None else len(y))
    with fastllm.backend("native"):
        outputs = _outputs(name, x, w, target if y is None else y)
    torch.manual_seed(1)
    pairs = [(t, torch.randn(t.shape).to(t.dtype)) for t in outputs if t.requires_grad]
    grads = []
    for _ in range(2):
        grads += torch.autograd.grad([t for t, _ in pairs], (x, w), [g for _, g in pairs], True, allow_unused=True)
    return outputs, grads


def _assert_same(got, expected):
    (outputs, grads), (outputs_there, grads_there) = got, expected
    for a, b in zip(outputs, outputs_there, strict=True):
        torch.testing.assert_close(a, b)  # a mean is summed in another order
    for a, b in zip(grads, grads_there, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_has_the_bits_of_the_chunks_code(monkeypatch, served, name, dtype):
    got = _all(name, dtype)
    widens = dtype == torch.bfloat16 and not fastllm.cpu.multiplies(dtype)
    assert all(served)
    assert bool(served) == (not widens)
    _without(monkeypatch, "at_once", lambda *args: None)
    _assert_same(got, _all(name, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_has_the_bits_of_calling_its_launcher(monkeypatch, name):
    got = _all(name, torch.float32)
    _without(monkeypatch, "unwatched", lambda *tensors: False)
    expected = _all(name, torch.float32)
    _assert_same(got, expected)
    for a, b in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mean", "rows", "log_probs"])
def test_many_ignored_targets_are_left_to_the_chunks_code(served, name):
    y = torch.where(torch.arange(N) == 3, -100, torch.arange(N))
    outputs, grads = _all(name, torch.float32, y)
    assert served
    assert not any(served)
    assert not grads[0][3].any()
    if name != "mean":
        assert outputs[0][3] == 0


ROWS = 64
FEW = torch.arange(ROWS) % V
FEW[[3, 39]] = -100


@pytest.mark.parametrize("name", NAMES)
def test_a_few_ignored_targets_are_zeros_in_one_call(monkeypatch, served, name):
    got = _all(name, torch.float64, FEW)
    assert served
    assert all(served)
    if name != "every_option":  # logsumexp and entropy are those of ignored rows too
        assert all(y.dim() == 0 or not y[[3, 39]].any() for y in got[0])
        assert not any(dx[[3, 39]].any() for dx in got[1][::2])
    _without(monkeypatch, "at_once", lambda *args: None)
    outputs, grads = _all(name, torch.float64, FEW)
    torch.testing.assert_close(got[0], outputs)
    torch.testing.assert_close([t for t in got[1] if t is not None], [t for t in grads if t is not None])


def test_ignored_targets_have_a_logsumexp_where_it_is_asked_for(served):
    x, w, _ = _tensors(torch.float32, ROWS)
    with fastllm.backend("native"):
        loss, lse = linear_cross_entropy(x, w, FEW, reduction="none", return_lse=True)
    assert all(served)
    torch.testing.assert_close(lse, (x @ w.t()).logsumexp(1))
    assert not loss[3]
    (dx,) = torch.autograd.grad(lse.sum(), x)
    torch.testing.assert_close(dx, (x @ w.t()).softmax(1) @ w)


@pytest.mark.parametrize("where", ["row", "weight"])
def test_what_is_not_finite_does_not_reach_ignored_rows(served, where):
    x, w, _ = _tensors(torch.float32, ROWS)
    with torch.no_grad():
        (x[3] if where == "row" else w[V - 1])[5] = torch.inf
    with fastllm.backend("native"):
        loss = linear_cross_entropy(x, w, FEW)
        dx, dw = torch.autograd.grad(loss, (x, w))
    assert any(served) == (where == "weight")
    assert not dx[[3, 39]].any()
    if where == "row":
        assert dw.isfinite().all()


def test_logits_that_onednn_computes_are_not_thrown_away(monkeypatch, served):
    seen = []

    def outputs(x, weight, bias=None):
        seen.append(len(x))
        return x @ weight.t()

    monkeypatch.setattr(at_once.onednn, "onednn_serves_rows", lambda x, weight: True)
    monkeypatch.setattr(at_once.onednn, "onednn_outputs", outputs)
    monkeypatch.setattr(at_once, "gradients_are_torchs", lambda layer: True)
    for rows, y in ((ROWS, FEW), (N, torch.full((N,), -100))):
        x, w, _ = _tensors(torch.float32, rows)
        with fastllm.backend("native"), torch.no_grad():
            linear_cross_entropy(x, w, y)
    assert seen == [ROWS]


def test_a_target_that_is_no_class_is_an_error():
    x, w, y = _tensors(torch.float32)
    y[2] = V
    with fastllm.backend("native"), pytest.raises(IndexError, match=rf"target {V} at position \[2\]"):
        linear_cross_entropy(x, w, y)


@pytest.mark.parametrize(
    "options",
    [dict(linear_bias=torch.zeros(V)), dict(weight=torch.ones(V)), dict(token_weight=torch.ones(N)),
     dict(max_targets=N), dict(max_workspace_mb=1e-4)],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_one_call_does_not_take_is_the_chunks(served, options):
    x, w, y = _tensors(torch.float32)
    with fastllm.backend("native"):
        loss = linear_cross_entropy(x, w, y, **options)
    assert not served
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ w.t(), y))


def test_an_infinite_loss_stays_infinite_in_the_mean(served):
    x, w, y = torch.ones(3, 1), torch.zeros(5, 1), torch.tensor([0, 1, 2])
    w[1] = -torch.inf
    with fastllm.backend("native"):
        assert linear_cross_entropy(x, w, y) == torch.inf
    assert served == [True]


def test_a_mode_sees_the_operator():
    class Names(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (func._schema.name,)
            return func(*args, **(kwargs or {}))

    x, w, y = _tensors(torch.float32)
    with Names() as names, fastllm.backend("native"):
        linear_cross_entropy(x, w, y)
    assert "fastllm::linear_cross_entropy_fwd" in names.seen
