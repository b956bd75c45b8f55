"""accelerate() beside what else people do to a model: compilers, export, checkpointing, offloading, other wrappers."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import build, same_gradients
from torch import nn
from torch.nn.utils import parametrize

import fastllm


class Block(nn.Module):
    """Post-norm residuals, a norm that two places share, and norms that are called as functions."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.shared = nn.RMSNorm(16)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30)

    def forward(self, ids):
        h = self.tokens(ids)
        h = h + self.shared(self.linear(h))
        h = h + self.norm(h)
        h = F.layer_norm(h, (16,), self.norm.weight, self.norm.bias)
        return self.head(self.shared(h))


def pair():
    model = Block()
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    return model, other, torch.randint(30, (2, 6)), torch.randint(30, (2, 6))


def loss_of(model, ids, labels):
    return F.cross_entropy(model(ids).view(-1, 30), labels.view(-1))


@pytest.mark.parametrize("order", ["before", "after"])
def test_compile_with_one_graph(order):
    model, other, ids, labels = pair()
    if order == "after":
        fastllm.revert(model)
    step = torch.compile(lambda i, y: loss_of(model, i, y), fullgraph=True, backend="aot_eager")
    step(ids, labels)
    if order == "after":
        fastllm.accelerate(model)
    model.zero_grad()
    step(ids, labels).backward()
    loss_of(other, ids, labels).backward()
    same_gradients(model, other)


def test_compile_of_an_accelerated_llama_is_one_graph():
    pytest.importorskip("transformers")
    model, inputs = build("llama")
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs, use_cache=False).loss.backward()
    other(**inputs, use_cache=False).loss.backward()
    same_gradients(model, other)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, other, ids, _ = pair()
    program = torch.export.export(model.eval(), (ids,), strict=strict)
    torch.testing.assert_close(program.module()(ids), other(ids))


def test_symbolic_tracing_sees_the_same_leaves():
    model = nn.Sequential(nn.Embedding(30, 8), nn.LayerNorm(8))
    fastllm.accelerate(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    ids = torch.arange(4)
    assert torch.equal(traced(ids), model(ids))
    assert fastllm.accelerate(traced).left


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, other, ids, labels = pair()
    for each in (model, other):
        h = each.tokens(ids)
        h = torch.utils.checkpoint.checkpoint(each.shared, h, use_reentrant=reentrant)
        F.cross_entropy(each.head(h).view(-1, 30), labels.view(-1)).backward()
    for part in ("tokens", "shared", "head"):
        same_gradients(getattr(model, part), getattr(other, part))


def test_parametrizations_and_weight_norm():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for first in ("accelerate", "parametrize"):
        norm = nn.LayerNorm(8)
        other = copy.deepcopy(norm)
        for each in (norm, other):
            if first == "accelerate" and each is norm:
                fastllm.accelerate(each)
            parametrize.register_parametrization(each, "weight", Double())
            if first == "parametrize" and each is norm:
                assert fastllm.accelerate(each).swapped
        x = torch.randn(3, 8)
        torch.testing.assert_close(norm(x), other(x))
        assert fastllm.revert(norm) == 1
        assert torch.equal(norm(x), other(x))
        parametrize.remove_parametrizations(norm, "weight")
        assert type(norm) is nn.LayerNorm
        # And of a module that stays accelerated.
        norm = nn.LayerNorm(8)
        nn.init.uniform_(norm.weight)
        other = copy.deepcopy(norm)
        if first == "accelerate":
            fastllm.accelerate(norm)
        for each in (norm, other):
            parametrize.register_parametrization(each, "weight", Double())
            parametrize.register_parametrization(each, "bias", Double())
        if first == "parametrize":
            fastllm.accelerate(norm)
        for name in ("weight", "bias"):
            for each in (norm, other):
                parametrize.remove_parametrizations(each, name)
            torch.testing.assert_close(norm(x), other(x))
        assert fastllm.revert(norm) == 1
        assert type(norm) is nn.LayerNorm
        assert torch.equal(norm(x), other(x))
    embedding = torch.nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4))
    want = embedding(torch.arange(5))
    fastllm.accelerate(embedding)
    torch.testing.assert_close(embedding(torch.arange(5)), want)


def test_functional_call_and_swapped_parameters():
    model, other, ids, _ = pair()
    parameters = {name: torch.randn_like(p) for name, p in other.named_parameters()}
    got = torch.func.functional_call(model, parameters, (ids,))
    torch.testing.assert_close(got + 0, torch.func.functional_call(other, parameters, (ids,)))


def test_casting_moving_and_offloading():
    model, other, ids, _ = pair()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        other.to(dtype)
        assert model(ids).dtype == dtype
        torch.testing.assert_close(model(ids) + 0, other(ids))
    assert model.to("meta")(ids.to("meta")).shape == (2, 6, 30)
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Embedding(30, 16), nn.LayerNorm(16), nn.Linear(16, 30)).eval()
    other = copy.deepcopy(model)
    fastllm.accelerate(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids))
        assert fastllm.revert(model) == 3
        assert torch.equal(model(ids), other(ids))
    assert model[1]._old_forward.__func__ is nn.LayerNorm.forward


def test_built_on_meta_and_loaded_later(tmp_path):
    save, load = pytest.importorskip("safetensors.torch").save_file, pytest.importorskip("safetensors.torch").load_file
    other = Block()
    save(other.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Block()
    fastllm.accelerate(model)
    model.load_state_dict(load(tmp_path / "model.safetensors"), assign=True)
    ids, labels = torch.randint(30, (2, 6)), torch.randint(30, (2, 6))
    torch.testing.assert_close(loss_of(model, ids, labels), loss_of(other, ids, labels))


def test_data_parallel_replicas_use_their_own_parameters():
    model, _, _, _ = pair()
    replica = model.norm._replicate_for_data_parallel()
    replica.weight, replica.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.ones(16))
    assert torch.equal(replica(torch.randn(2, 16)), torch.ones(2, 16))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised_and_lazy_and_weird_parts_are_left_alone():
    lazy = nn.LazyLinear(30)
    quantised = torch.ao.nn.quantized.dynamic.Linear(16, 30)
    model = nn.ModuleDict({"tokens": nn.Embedding(30, 16), "lazy": lazy, "quantised": quantised})
    model["frozen_table"] = nn.Embedding.from_pretrained(torch.randint(9, (30, 4)).int(), freeze=True)
    report = fastllm.accelerate(model)
    assert {e.path: e.why for e in report.left}["frozen_table"] == "weight is int32"
    assert "lazy" not in {e.path for e in report.swapped}
    assert model["quantised"](torch.randn(2, 16)).shape == (2, 30)
    assert model["lazy"](torch.randn(2, 16)).shape == (2, 30)
    assert torch.equal(model["frozen_table"](torch.tensor([3])), model["frozen_table"].weight[3:4])


def test_embedding_options():
    for options in ({"max_norm": 0.5}, {"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 1}):
        table = nn.Embedding(6, 4, **options)
        other = copy.deepcopy(table)
        fastllm.accelerate(table)
        ids = torch.tensor([[1, 1, 5], [2, 1, 0]])
        table(ids).square().sum().backward()
        other(ids).square().sum().backward()
        torch.testing.assert_close(table.weight.grad.to_dense(), other.weight.grad.to_dense())
        torch.testing.assert_close(table.weight, other.weight)


def test_gated_mlps_are_measured():
    class Gated(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.activation = activation

        def forward(self, x):
            return self.w2(self.activation(self.w1(x)) * self.w3(x))

    class ClampedMLP(Gated):
        def forward(self, x):
            return self.w2((self.activation(self.w1(x)) * self.w3(x)).clamp(-1, 1))

    x = torch.randn(3, 8)
    for activation, op in ((F.silu, "swiglu"), (nn.GELU(), "geglu"), (nn.GELU("tanh"), "geglu"), (F.relu, None)):
        mlp = Gated(activation)
        other = copy.deepcopy(mlp)
        report = fastllm.accelerate(mlp)
        assert [e.by for e in report.swapped] == ([op] if op else [])
        torch.testing.assert_close(mlp(x), other(x))
        mlp(x).square().sum().backward()
        other(x).square().sum().backward()
        same_gradients(mlp, other)
        mlp.zero_grad()
    several = nn.ModuleList([Gated(nn.SiLU()), Gated(nn.GELU()), Gated(nn.ReLU())])
    assert [e.by for e in fastllm.accelerate(several).swapped] == ["swiglu", "geglu"]
    others = copy.deepcopy(several)
    fastllm.revert(others)
    several[0].activation = others[0].activation = nn.Tanh()
    for mlp, other in zip(several, others, strict=True):
        torch.testing.assert_close(mlp(x), other(x))
    assert fastllm.accelerate(ClampedMLP(F.silu)).left[0].why.startswith("its forward is none of swiglu")


class Limited(nn.Module):
    """As DeepSeek V4's; each wish is a forward that differs from it."""

    def __init__(self, limit, wish=""):
        super().__init__()
        self.packed = wish == "packed"
        self.gate, self.up, self.down = nn.Linear(8, 12 * (1 + self.packed)), nn.Linear(8, 12), nn.Linear(12, 8)
        if self.packed:
            del self.up
        self.limit, self.wish = limit, wish

    def forward(self, x):
        gate, up = self.gate(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        gate = F.silu(gate).clamp(max=self.limit) if self.wish == "late" else F.silu(gate.clamp(max=self.limit))
        if self.wish == "both":
            gate = F.silu(self.gate(x).clamp(-self.limit, self.limit))
        return self.down(
            gate * (up.clamp(max=self.limit) if self.wish == "above" else up.clamp(-self.limit, self.limit))
        )


@pytest.mark.parametrize("wish", ["", "packed", "late", "both", "above"])
@pytest.mark.parametrize("limit", [0.5, 7])
def test_gated_mlps_between_bounds(limit, wish):
    mlp = Limited(limit, wish)
    other = copy.deepcopy(mlp)
    assert [e.by for e in fastllm.accelerate(mlp).swapped] == (["swiglu"] if wish in ("", "packed") else [])
    x = 4 * limit * torch.randn(5, 8)
    for each in (mlp, other):
        each(x).square().sum().backward()
    torch.testing.assert_close(mlp(x), other(x))
    for p, q in zip(mlp.parameters(), other.parameters(), strict=True):
        # Both are up to 8e-7 of the largest number from fp64.
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=2e-6 * q.grad.abs().max().item())
    mlp.limit = other.limit = 2 * limit
    torch.testing.assert_close(mlp(x), other(x))


def test_what_is_found_does_not_depend_on_the_modes_around():
    pytest.importorskip("transformers")
    layer = build("mixtral")[0].model.layers[0]
    with contextlib.ExitStack() as stack:
        for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            stack.enter_context(mode)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16)
        stack.callback(torch.set_default_device, None)
        torch.set_default_device("meta")
        report = fastllm.accelerate(layer, dry_run=True)
    assert sorted(entry.by for entry in report.swapped) == ["rms_norm", "rms_norm", "swiglu"]
    assert not report.left
