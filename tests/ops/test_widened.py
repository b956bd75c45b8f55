"""16-bit tensors on a CPU without 16-bit products: linear, attention and whole models, in blocks widened to fp32."""

import contextlib
import copy
import itertools
import math

import contract
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastllm
from fastllm import cpu, extension
from fastllm import functional as FF
from fastllm.backends import pick
from fastllm.environment import serving
from fastllm.ops import linear as linear_op
from fastllm.ops.attention import forms
from fastllm.ops.attention import widened as widened_attention
from fastllm.ops.shared import onednn, widened
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("anywhere")
DTYPES = [torch.bfloat16, torch.float16]


@contextlib.contextmanager
def _multiplying(monkeypatch, *dtypes):
    found = cpu.Cpu("avx2", {}, {dtype: dtype in dtypes for dtype in DTYPES})
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "here", lambda: found)
        yield


@pytest.fixture
def _no_products(monkeypatch):
    with _multiplying(monkeypatch):
        yield


@pytest.fixture
def _small_blocks(monkeypatch):
    """Several blocks, whole and broken, of every matrix."""
    monkeypatch.setattr(widened, "BLOCK", 64)
    monkeypatch.setattr(widened, "MIN_ROWS", 3)
    monkeypatch.setattr(widened_attention, "BLOCK", 500)


def _holds(op: str, dtype, names=None):
    """The op's samples against fp64 by the rule for numbers; returns how many there were."""
    count = 0
    for sample in OPS[op].samples(torch.device("cpu"), dtype):
        if names is not None and sample.name not in names:
            continue
        got = contract.run(OPS[op].function, contract.copy(sample))
        stick = contract.run(OPS[op].reference, contract.copy(sample))
        truth = contract.run(OPS[op].reference, contract.copy(sample, torch.float64))
        chained = (itertools.chain.from_iterable(found) for found in (got, stick, truth))
        for mine, yard, true in zip(*chained, strict=True):
            contract.assert_as_true(mine, true, yard, dtype, sample.name)
        count += 1
    return count


@pytest.mark.usefixtures("_no_products", "_small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "scaled_dot_product_attention", "attention"])
def test_blocks_hold_to_the_rule(op, dtype):
    assert _holds(op, dtype) > 5


@pytest.mark.usefixtures("_no_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_probs", "linear_kl_div"])
def test_losses_hold_to_the_rule_where_only_the_extension_multiplies(op, dtype):
    """PyTorch's caps may be lower than the extension's: each product is its own library's choice."""
    assert _holds(op, dtype) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_capability_decides(dtype, monkeypatch):
    step = linear_op.MAX_NARROW_ROWS
    x, weight = torch.zeros(step + 1, 16, dtype=dtype), torch.zeros(4, 16, dtype=dtype)

    def form(*args):
        call = OPS["linear"].call(*args)
        return linear_op.linear_form(call, pick("linear", call)).name

    with _multiplying(monkeypatch, dtype):
        assert form(x, weight) == linear_op.TORCH
    with _multiplying(monkeypatch):
        assert form(x, weight) == linear_op.WIDENED
        few, rows = x[: linear_op.MIN_ROWS - 1], linear_op.ROWS if extension.missing() is None else linear_op.TORCH
        assert form(few, weight) == form(x[:step], weight) == rows
        assert form(x[:step], weight.clone().requires_grad_()) == linear_op.WIDENED
        assert form(few, weight.t().contiguous().t()) == linear_op.TORCH
        assert form(few, weight.clone().requires_grad_()) == linear_op.TORCH
        with torch.no_grad():
            assert form(few, weight.clone().requires_grad_()) == rows
        assert form(x.float(), weight.float()) == linear_op.TORCH
        assert form(x, weight[0]) == linear_op.TORCH
        assert torch.func.vmap(FF.linear, (0, None))(x.expand(3, step + 1, 16), weight).shape == (3, step + 1, 4)
        said = [why for (_, why) in serving(OPS["linear"], torch.device("cpu"))]
        assert any(linear_op.WIDENED in why for why in said)


@pytest.mark.usefixtures("_no_products")
def test_autocast_casts_as_torch_does_and_its_blocks_stay_in_fp32():
    x, weight, bias = torch.randn(9, 40), torch.randn(7, 40, requires_grad=True), torch.randn(7)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = FF.linear(x, weight, bias), F.linear(x, weight, bias)
        got.float().sum().backward()
    assert got.dtype == expected.dtype == torch.bfloat16
    exact = F.linear(x.bfloat16().float(), weight.detach().bfloat16().float(), bias.bfloat16().float())
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0, atol=0)
    assert weight.grad.dtype == torch.float32


@pytest.mark.usefixtures("_no_products")
def test_dropped_scores_are_seeded_and_differentiable():
    q, k, v = (torch.randn(1, 2, 20, 16).bfloat16().requires_grad_() for _ in range(3))
    torch.manual_seed(3)
    first = FF.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(3)
    second = FF.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    assert torch.equal(first, second)
    assert all(g.isfinite().all() for g in torch.autograd.grad(first.sum(), (q, k, v)))


@pytest.mark.usefixtures("_no_products")
@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        ((torch.zeros(4, 8), torch.zeros(3, 9)), ValueError, "weight must be"),
        ((torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4)), ValueError, "bias must have shape"),
        ((torch.zeros(4, 8), torch.zeros(3, 8).bfloat16()), TypeError, "weight must have input's dtype"),
        ((torch.zeros(4, 8).long(), torch.zeros(3, 8)), TypeError, "input must be a floating-point"),
    ],
)
def test_errors_name_the_argument(args, error, said):
    with pytest.raises(error, match=f"linear: {said}"):
        FF.linear(*args)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16, bias=False)
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(x))))


def _gradients(model, ids, labels):
    model.zero_grad()
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        model.eval()
        out = model(ids)
        model.train()
    return [out, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_accelerate_swaps_linear_layers_where_the_cpu_lacks_products_and_only_there(dtype, monkeypatch):
    monkeypatch.setattr(onednn, "_fewest", lambda: math.inf)  # layers in float32 are PyTorch's, whatever this CPU is
    torch.manual_seed(0)
    model = _Model().to(dtype)
    ids, labels = torch.randint(40, (3, 12)), torch.randint(40, (3, 12))
    truth = _gradients(copy.deepcopy(model).double(), ids, labels)
    before, keys = _gradients(model, ids, labels), list(model.state_dict())
    with _multiplying(monkeypatch, *DTYPES):
        report = fastllm.accelerate(model, dry_run=True)
        assert "linear" not in {entry.by for entry in report.swapped}
    with _multiplying(monkeypatch):
        assert "linear" not in {e.by for e in fastllm.accelerate(copy.deepcopy(model).float(), dry_run=True).swapped}
        report = fastllm.accelerate(model)
        assert {e.path for e in report.swapped if e.by == "linear"} == {"up", "down", "attention.out_proj"}
        assert list(model.state_dict()) == keys
        got = _gradients(model, ids, labels)
        for mine, yard, true in zip(got, before, truth, strict=True):
            contract.assert_as_true(mine, true, yard, dtype, "model")
        with report.calls() as calls:
            _gradients(model, ids, labels)
        assert {c.op for c in calls if c.backend == "own"} <= {"linear_cross_entropy"}
        assert fastllm.revert(model) == len(report.swapped)
    assert type(model.up).forward is nn.Linear.forward
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, ids, labels), before, strict=True))


@pytest.mark.usefixtures("_no_products")
def test_a_subclass_with_a_forward_of_its_own_is_left_and_said():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    report = fastllm.accelerate(nn.Sequential(Scaled(8, 8).bfloat16()))
    assert [(e.path, "forward of its own" in e.why) for e in report.left] == [("0", True)]


@pytest.mark.usefixtures("_no_products")
def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(24, 16).bfloat16()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 16).bfloat16().requires_grad_()
    expected = F.linear(x.double(), layer.weight.double().t(), layer.bias.double())
    truth = torch.autograd.grad(expected.sum(), (x, layer.weight, layer.bias))
    report = fastllm.accelerate(layer)
    assert [e.by for e in report.swapped] == ["linear"]
    with report.calls() as calls:
        out = layer(x)
    assert calls.backends == {"eager": 1}
    grads = torch.autograd.grad(out.sum(), (x, layer.weight, layer.bias))
    assert grads[1].is_contiguous()
    eps = torch.finfo(torch.bfloat16).eps
    for mine, true in zip((out, *grads), (expected, *truth), strict=True):
        assert (mine.double() - true).norm() <= eps * true.norm()


@pytest.mark.usefixtures("_no_products")
def test_a_call_holds_no_wide_copy_of_the_weight():
    x, weight = torch.randn(9, 512).bfloat16(), torch.randn(8192, 512).bfloat16()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    call = OPS["linear"].call(x, weight)
    assert linear_op.linear_form(call, pick("linear", call)).name == linear_op.WIDENED
    with Watch():
        linear_op.widened_linear(x, weight, None, x.new_empty(9, 8192))
        linear_op.widened_weight_grad(x.new_ones(9, 8192), x, torch.empty_like(weight))
    assert 0 < largest <= widened.BLOCK
    assert forms.WIDENED != forms.TORCH


@pytest.mark.parametrize("dtype", DTYPES, ids=contract.case_id)
def test_a_compiler_takes_what_this_cpu_multiplies_as_it_is(dtype):
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    compiled = torch.compile(FF.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), FF.linear(x, weight))
