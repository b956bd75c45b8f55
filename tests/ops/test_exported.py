"""torch.export and torch.jit.trace of every op: a program of PyTorch's operators, with their gradients."""

import pytest
import torch
from contract import case_id, copy, leaves, outputs, sample_grad_outputs

import fastllm
from fastllm import cpu, nn
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("anywhere")


class Called(torch.nn.Module):
    """An op on the tensors of a sample that take a gradient, as parameters."""

    def __init__(self, op, sample):
        super().__init__()
        self.op, self.args, self.kwargs = op, sample.args, dict(sample.kwargs)
        self.values = torch.nn.ParameterList(leaves(sample))

    def forward(self):
        values = iter(self.values)

        def leaf(x):
            return next(values) if isinstance(x, torch.Tensor) and x.requires_grad else x

        args, kwargs = torch.utils._pytree.tree_map(leaf, (self.args, self.kwargs))
        return tuple(outputs(self.op.function(*args, **kwargs)))


def gradients(module, values, name):
    outs = outputs(module())
    grads = [g for o, g in zip(outs, sample_grad_outputs(name, outs), strict=True) if o.requires_grad]
    return outs, torch.autograd.grad([o for o in outs if o.requires_grad], list(values), grads, allow_unused=True)


# PyTorch's exact gelu is 1 + erf, which cancels below 0: it is up to 1.9e-6 from the extension's.
CLOSE = {"rtol": 1e-5, "atol": 4e-6}


def exported_with_torchs_operators(module, *args, strict=False):
    program = torch.export.export(module, args, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "fastllm" in name or "set_grad" in name]
    return program.module()


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_an_exported_op_is_of_pytorchs_operators_and_has_their_gradient(op):
    sample = next(s for s in op.samples(torch.device("cpu"), torch.float32) if leaves(s))
    module = Called(op, copy(sample))
    exported = exported_with_torchs_operators(module)
    got = gradients(exported, exported.parameters(), sample.name)
    expected = gradients(module, module.parameters(), sample.name)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_exported_dropout_is_drawn_at_each_call_and_has_its_gradient():
    exported = exported_with_torchs_operators(nn.AddRMSNorm(16, dropout_p=0.5).train(), *torch.ones(2, 4, 16))
    x = torch.ones(4, 16, requires_grad=True)
    first, again = (exported(x, torch.zeros(4, 16))[1] for _ in range(2))
    assert not torch.equal(first, again)
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(grad, first)
    assert set(grad.unique().tolist()) == {0.0, 2.0}


@pytest.fixture
def _no_narrow_products(monkeypatch):
    found = cpu.Cpu("avx2", {}, {torch.bfloat16: False, torch.float16: False})
    monkeypatch.setattr(cpu, "here", lambda: found)


def traced_with_torchs_operators(module, *args):
    traced = torch.jit.trace(module, args)
    text = str(traced.inlined_graph)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "fastllm::" not in text
    assert {kind.split("::")[0] for kind in kinds} <= {"aten", "prim"}
    assert "prim::PythonOp" not in kinds
    return traced


@pytest.mark.parametrize("made", [exported_with_torchs_operators, traced_with_torchs_operators])
@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("_no_narrow_products")
def test_a_program_of_sixteen_bits_without_a_gradient(op, made):
    samples = {s.name: s for s in op.samples(torch.device("cpu"), torch.bfloat16) if leaves(s)}
    for name in {next(iter(samples)), "one_token", "one_row"} & set(samples):
        module = Called(op, copy(samples[name])).requires_grad_(False)
        torch.testing.assert_close(made(module)(), module(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("made", [exported_with_torchs_operators, traced_with_torchs_operators])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_program_scales_the_rows_of_a_table_down(made):
    table, ids = nn.Embedding(5, 4, max_norm=0.5), torch.tensor([1, 3])
    program = made(table, ids)
    with torch.no_grad():
        table.weight.fill_(1.0)
    torch.testing.assert_close(program(ids), torch.full((2, 4), 0.25))
    torch.testing.assert_close(table.weight[:, 0], torch.tensor([1.0, 0.25, 1.0, 0.25, 1.0]))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_no_narrow_products")
def test_an_accelerated_model_exported_without_a_gradient(strict, dtype):
    class RMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))
            self.eps = 1e-6

        def forward(self, x):
            wide = x.float()
            return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    model = torch.nn.Sequential(RMSNorm(), torch.nn.Linear(64, 1024)).to(dtype).eval()
    assert fastllm.accelerate(model).swapped
    x = torch.randn(2, 64, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(exported_with_torchs_operators(model, x, strict=strict)(x), model(x))
