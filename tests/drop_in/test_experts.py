"""Mixtures of experts in parameters of three dimensions: what is recognised, what it computes, what is left and why."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from contract import assert_all_as_true
from torch import nn

import fastllm

EXPERTS, HIDDEN, INNER, TOKENS, EACH = 4, 6, 10, 9, 2


class Mixture(nn.Module):
    """Experts as transformers writes them: packed projections, a loop over the experts that were hit."""

    def __init__(self, transposed=False, bias=False, experts=EXPERTS):
        super().__init__()
        self.transposed = transposed

        def matrices(rows, columns):
            shape = (columns, rows) if transposed else (rows, columns)
            return nn.Parameter(torch.randn(experts, *shape))

        self.up, self.down = matrices(2 * INNER, HIDDEN), matrices(HIDDEN, INNER)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * INNER)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(experts, HIDDEN)) if bias else None
        self.act = nn.SiLU()

    def by(self, x, weight, bias, expert):
        y = x @ (weight[expert] if self.transposed else weight[expert].mT)
        return y if bias is None else y + bias[expert]

    def gated(self, packed):
        gate, up = packed.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, hidden, numbers, weights):
        out = torch.zeros_like(hidden)
        for expert in range(len(self.down)):
            token, place = torch.where(numbers == expert)
            y = self.gated(self.by(hidden[token], self.up, self.up_bias, expert))
            y = self.by(y, self.down, self.down_bias, expert)
            out = out.index_add(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out


class Interleaved(Mixture):
    """gpt-oss's gate."""

    def __init__(self):
        super().__init__(transposed=True, bias=True)
        self.alpha, self.limit = 1.702, 7.0

    def gated(self, packed):
        gate, up = packed[..., ::2].clamp(max=self.limit), packed[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


class Clamped(Mixture):
    """DeepSeek V4's gate."""

    def __init__(self):
        super().__init__()
        self.limit = 3.0

    def gated(self, packed):
        gate, up = packed.chunk(2, -1)
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class Tanh(Mixture):
    def gated(self, packed):
        gate, up = packed.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up


class Separate(nn.Module):
    """Gate and up apart, the weights before the experts' numbers."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN)) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    def forward(self, x, scores, chosen):
        gate, up = (torch.einsum("th,eih->tei", x, w) for w in (self.w1, self.w3))
        y = torch.einsum("tei,ehi->teh", F.gelu(gate) * up, self.w2)
        y = y.gather(1, chosen.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return (y * scores.unsqueeze(-1)).sum(1).to(x.dtype)


def routing(experts=EXPERTS, tokens=TOKENS, each=EACH, dtype=torch.float32):
    numbers = torch.rand(tokens, experts).topk(each).indices
    return torch.randn(tokens, HIDDEN).to(dtype), numbers, (torch.rand(tokens, each) + 0.1).to(dtype)


def outcome(module, x, numbers, weights):
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    given = (x, weights, numbers) if isinstance(module, Separate) else (x, numbers, weights)
    y = module(*given)
    grads = torch.autograd.grad(y.square().sum(), [x, weights, *module.parameters()])
    return [y.detach()], grads


KINDS = {
    "packed": (Mixture, "swiglu"),
    "transposed": (lambda: Mixture(transposed=True), "swiglu"),
    "biased": (lambda: Mixture(bias=True), "swiglu"),
    "interleaved": (Interleaved, "swiglu"),
    "clamped": (Clamped, "swiglu"),
    "tanh": (Tanh, "geglu"),
    "separate": (Separate, "geglu"),
    "one expert": (lambda: Mixture(experts=1), "swiglu"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gated_experts_are_served_and_as_true_as_before(kind):
    make, op = KINDS[kind]
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module = make().to(dtype)
        experts = 1 if kind == "one expert" else EXPERTS
        x, numbers, weights = routing(experts, each=min(EACH, experts), dtype=dtype)
        if experts > 1:
            numbers = numbers % 3  # an expert without tokens, and tokens that have one twice
        other = copy.deepcopy(module)
        report = fastllm.accelerate(module)
        assert [entry.by for entry in report.swapped if not entry.path] == [op], report
        with report.calls() as calls:
            got = outcome(module, x, numbers, weights)
        native = dtype != torch.float64 and fastllm.extension.missing() is None
        assert {(c.op, c.backend) for c in calls} == {(op, "native" if native else "eager")}
        if dtype == torch.float64:
            torch.testing.assert_close(got, outcome(other, x, numbers, weights), rtol=1e-10, atol=1e-10)
        else:
            wide = (copy.deepcopy(other).double(), x.double(), numbers, weights.double())
            eager = outcome(other, x, numbers, weights)
            assert_all_as_true(got, functools.partial(outcome, *wide), eager, dtype, f"{kind} {dtype}")
        assert fastllm.revert(pickle.loads(pickle.dumps(module))) == 1
        fastllm.revert(module)
        assert type(module) is type(other)


class SquaredExperts(Mixture):
    def gated(self, packed):
        gate, up = packed.chunk(2, -1)
        return F.relu(gate).square() * up


class NormalisesExperts(Mixture):
    def forward(self, hidden, numbers, weights):
        return super().forward(hidden, numbers, weights / weights.sum(-1, keepdim=True))


class DropsInTrainingExperts(Mixture):
    def gated(self, packed):
        return F.dropout(super().gated(packed), 0.5, self.training)


class StopsTheRouterExperts(Mixture):
    def forward(self, hidden, numbers, weights):
        return super().forward(hidden, numbers, weights.detach())


class ClampsAfterExperts(Clamped):
    def gated(self, packed):
        gate, up = packed.chunk(2, -1)
        return F.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


class TakesOneExperts(Mixture):
    def forward(self, hidden):
        return hidden


class UngatedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SquaredExperts, "none of swiglu"),
        (NormalisesExperts, "none of swiglu"),
        (DropsInTrainingExperts, "none of swiglu"),
        (StopsTheRouterExperts, "none of swiglu"),
        (ClampsAfterExperts, "none of swiglu"),
        (TakesOneExperts, "does not take"),
        (UngatedExperts, "gate and up"),
    ],
)
def test_other_experts_are_left_and_the_report_says_why(kind, why):
    module = kind()
    before = torch.random.get_rng_state()
    report = fastllm.accelerate(module)
    assert not report.swapped
    assert [why in entry.why for entry in report.left] == [True], report
    assert torch.equal(before, torch.random.get_rng_state())


def own(report, module, *given, **named):
    with report.calls() as calls:
        y = module(*given, **named)
    assert [c.backend for c in calls] == ["own"], calls
    return y, next(iter(calls)).why


def test_calls_that_were_not_measured_take_the_forward_from_before():
    torch.manual_seed(0)
    module = Clamped()
    module.config = type("Config", (), {"_experts_implementation": "eager"})()
    other = copy.deepcopy(module)
    report = fastllm.accelerate(module)
    x, numbers, weights = routing()
    expected = other(x, numbers, weights)
    torch.testing.assert_close(module(x, weights=weights, numbers=numbers), expected)

    y, why = own(report, module, x, numbers.where(numbers != 0, EXPERTS), weights)  # a number of no expert
    assert "numbers" in why
    assert torch.equal(y, other(x, numbers.where(numbers != 0, EXPERTS), weights))
    y, why = own(report, module, x[:0], numbers[:0], weights[:0])
    assert y.shape == (0, HIDDEN)
    module.config._experts_implementation = "another"
    y, why = own(report, module, x, numbers, weights)
    assert "implementation" in why
    assert torch.equal(y, expected)
    module.config._experts_implementation = "eager"
    module.limit = other.limit = 0.5
    y, why = own(report, module, x, numbers, weights)
    assert "changed" in why
    assert torch.equal(y, other(x, numbers, weights))
    module.limit = 3.0
    handle = module.act.register_forward_hook(lambda *_: None)
    assert "changed" in own(report, module, x, numbers, weights)[1]
    handle.remove()
    with pytest.raises(TypeError):
        module(x, numbers)


def test_autocast_casts_the_products_where_it_did_before():
    torch.manual_seed(0)
    module = Mixture()
    other = copy.deepcopy(module)
    assert fastllm.accelerate(module).swapped
    given = routing()
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = module(*given), other(*given)
    assert got.dtype == eager.dtype == torch.float32
    truth = other.double()(*(t.double() if t.is_floating_point() else t for t in given))
    assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max()
    assert (got - truth).abs().max() > 1e-4


def test_second_derivatives():
    torch.manual_seed(0)
    module = Interleaved().double()
    assert fastllm.accelerate(module).swapped
    x, numbers, weights = routing(tokens=3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, weights: module(x, numbers, weights), (x.requires_grad_(), weights.requires_grad_())
    )


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("transposed", [False, True])
def test_torchs_grouped_product_gives_the_same(transposed, monkeypatch):
    """What a GPU takes in bf16. On a CPU torch has it, too, for strides of 16 bytes: 4 columns of fp32."""
    monkeypatch.setattr("fastllm.drop_in.experts._has_grouped_product", lambda x, weight: True)
    monkeypatch.setattr(f"{__name__}.HIDDEN", 8)
    monkeypatch.setattr(f"{__name__}.INNER", 12)
    torch.manual_seed(0)
    module = Mixture(transposed, bias=True)
    other = copy.deepcopy(module)
    assert fastllm.accelerate(module).swapped
    x, numbers, weights = routing()
    for chosen in (numbers, numbers % 3):
        (outputs, grads), (outputs_there, grads_there) = (outcome(each, x, chosen, weights) for each in (module, other))
        for got, expected in zip((*outputs, *grads), (*outputs_there, *grads_there), strict=True):
            # Both are up to 7e-7 of the largest number from fp64.
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("when", ["before", "after"])
def test_experts_that_are_registered_by_the_name_asked_for_are_called(when, monkeypatch):
    pytest.importorskip("transformers.integrations.moe")
    from architectures import build
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, inputs = build("mixtral")
    name = model.config._experts_implementation
    if name not in ALL_EXPERTS_FUNCTIONS:
        pytest.skip(f'this transformers asks for "{name}" experts, which are no registered function')
    theirs, called = ALL_EXPERTS_FUNCTIONS[name], []
    expected = model(**inputs).loss

    def registered():
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS._global_mapping, name, lambda *args: called.append(1) or theirs(*args)
        )

    if when == "after":
        fastllm.accelerate(model)
        model(**inputs)
        assert not called
        registered()
    else:
        registered()
        report = fastllm.accelerate(model)
        assert any(f'registered as "{name}"' in entry.why for entry in report.left)
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert len(called) == model.config.num_hidden_layers
