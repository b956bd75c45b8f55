"""torch.fx.symbolic_trace records a call of an op or of a module as one node, as it does of torch.nn's."""

import inspect
import io

import pytest
import torch
from contract import case_id, copy, leaves, outputs

from fastllm import nn
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("anywhere")


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_an_op_of_a_proxy_is_one_node(op):
    sample = copy(next(s for s in op.samples(torch.device("cpu"), torch.float32) if leaves(s)))
    names = list(inspect.signature(op.function).parameters)
    alone = next(i for i, arg in enumerate(sample.args) if isinstance(arg, torch.Tensor | list | tuple))
    given = sample.args[alone]

    class Called(torch.nn.Module):
        def forward(self, x):
            args = list(sample.args)
            args[alone] = x if isinstance(given, torch.Tensor) else [x, *given[1:]]
            return op.function(*args, **sample.kwargs)

    traced = torch.fx.symbolic_trace(Called())
    nodes = [node for node in traced.graph.nodes if node.op not in ("get_attr", "placeholder", "output")]
    assert [(node.op, node.target) for node in nodes] == [("call_function", op.function)], names[alone]
    value = given if isinstance(given, torch.Tensor) else given[0]
    assert all(map(torch.equal, outputs(traced(value)), outputs(op.function(*sample.args, **sample.kwargs))))


ROWS = torch.randn(5, 3, 8)
IDS = torch.tensor([[1, 0, 3]])
LABELS = torch.tensor([0, 4, 2])
MODULES = {
    "LayerNorm": (nn.LayerNorm(8), ROWS),
    "RMSNorm": (nn.RMSNorm(8), ROWS),
    "AddLayerNorm": (nn.AddLayerNorm(8, dropout_p=0.5), ROWS, ROWS),
    "AddRMSNorm": (nn.AddRMSNorm(8, dropout_p=0.5), ROWS, ROWS),
    "Linear": (nn.Linear(8, 6), ROWS),
    "SwiGLU": (nn.SwiGLU(), ROWS),
    "GEGLU": (nn.GEGLU(), ROWS, ROWS),
    "Embedding": (nn.Embedding(9, 8), IDS),
    "EmbeddingSum": (nn.EmbeddingSum([9, 4], 8, dropout=0.5), IDS),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), ROWS[0], LABELS),
    "LinearCrossEntropyLoss": (nn.LinearCrossEntropyLoss(8, 6), ROWS[0], LABELS),
    "LinearCrossEntropyHead": (nn.LinearCrossEntropyHead(8, 6), ROWS[0], LABELS),
    "MultiheadAttention": (nn.MultiheadAttention(8, 2, dropout=0.5), ROWS, ROWS, ROWS),
}


def test_every_module_is_here():
    assert set(MODULES) == set(nn.__all__)


def _within(module, count):
    """A model that calls ``module``, since torch.fx does not trace torch's own MultiheadAttention by itself."""
    arguments = ", ".join("xyz"[:count])
    scope = {"torch": torch}
    code = f"class Model(torch.nn.Module):\n  def forward(self, {arguments}):\n    return self.inner({arguments})"
    exec(code, scope)
    model = scope["Model"]()
    model.inner = module
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_traced_within_a_model(name, training):
    module, *args = MODULES[name]
    model = _within(module, len(args)).train(training)
    traced = torch.fx.symbolic_trace(model)
    (call,) = (node for node in traced.graph.nodes if node.op.startswith("call_"))
    assert call.op == ("call_module" if name == "MultiheadAttention" else "call_function")
    found = []
    for each in (traced, model):
        torch.manual_seed(3)
        found.append([out for out in outputs(each(*args)) if out is not None])
    assert all(map(torch.equal, *found))


def test_a_traced_model_is_saved_and_trained():
    model = torch.nn.Sequential(nn.Embedding(9, 8), nn.RMSNorm(8), nn.Linear(8, 6))
    file = io.BytesIO()
    torch.save(torch.fx.symbolic_trace(model), file)
    file.seek(0)
    traced = torch.load(file, weights_only=False)
    for each in (traced, model):
        each(IDS).square().sum().backward()
    grads = [dict(each.named_parameters()) for each in (traced, model)]
    assert grads[0].keys() == grads[1].keys()
    for name, parameter in grads[1].items():
        assert torch.equal(parameter.grad, grads[0][name].grad)
