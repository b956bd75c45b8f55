"""One tensor given for two arguments, itself or as a view: every op, every pair of arguments of one shape and dtype."""

from itertools import combinations

import pytest
import torch
from conftest import DEVICE
from contract import case_id, copy, graph_cases, outputs, sample_grad_outputs
from thorough import IS_THOROUGH
from torch.utils import _pytree as pytree

import fastllm
from fastllm import OPS

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


def flat(sample):
    return pytree.tree_flatten_with_path((sample.args, dict(sample.kwargs)))


def pairs(op):
    """(names of two arguments, a sample in which the first one can be given for both, their places), each pair once."""
    found = {}
    for sample in op.samples(DEVICE, torch.float32):
        leaves, _ = flat(sample)
        for (i, (first, a)), (j, (second, b)) in combinations(enumerate(leaves), 2):
            if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or a is b or a.numel() == 0:
                continue
            if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
                continue
            names = pytree.keystr(first), pytree.keystr(second)
            if names not in found and valid(op, sample, i, j):
                found[names] = sample, i, j
    return [(names, *rest) for names, rest in found.items()]


def valid(op, sample, i, j):
    """Whether the call is one: the ids of one table may lie outside another."""
    leaves, spec = flat(copy(sample))
    values = [leaf for _, leaf in leaves]
    args, kwargs = pytree.tree_unflatten([*values[:j], values[i], *values[j + 1 :]], spec)
    try:
        op.reference(*args, **kwargs)
    except (IndexError, ValueError):
        return False
    return True


def run(op, sample, i, j, how, compiled=False):
    """(outputs, gradients) where argument j is argument i; the gradient of a tensor of its own is added to i's."""
    leaves, spec = flat(copy(sample))
    values = [leaf for _, leaf in leaves]

    def call(values):
        second = {"same": values[i], "view": values[i].view_as(values[i]), "own": values[j]}[how]
        args, kwargs = pytree.tree_unflatten([*values[:j], second, *values[j + 1 :]], spec)
        return outputs(op.function(*args, **kwargs))

    if how == "own":
        values[j] = values[i].detach().clone().requires_grad_(values[i].requires_grad)
    torch.manual_seed(0)
    outs = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(values)
    wanted = [k for k, t in enumerate(values) if isinstance(t, torch.Tensor) and t.requires_grad]
    given = [(o, g) for o, g in zip(outs, sample_grad_outputs(sample.name, outs), strict=True) if o.requires_grad]
    if not given or not wanted:
        return outs, {}
    found = torch.autograd.grad(
        [o for o, _ in given], [values[k] for k in wanted], [g for _, g in given], allow_unused=True
    )
    grads = {k: torch.zeros_like(values[k]) if g is None else g for k, g in zip(wanted, found, strict=True)}
    if j in grads:
        own = grads.pop(j)
        if how == "own":
            grads[i] = grads[i] + own
    return outs, grads


@pytest.mark.parametrize(("op", "backend"), graph_cases(DEVICE), ids=case_id)
def test_one_tensor_for_two_arguments(op, backend):
    with fastllm.backend(backend):
        for at, (names, sample, i, j) in enumerate(pairs(op), backend != "eager"):
            truth = run(op, sample, i, j, "own")
            for how in ("same", "view"):
                torch._dynamo.reset()
                # Compiled, which takes seconds, pairs take turns with the two ways, on eager the other way round.
                both = IS_THOROUGH or how == ("same", "view")[at % 2]
                for compiled in (False, True) if both else (False,):
                    found = run(op, sample, i, j, how, compiled)
                    what = f"{sample.name}, {' and '.join(names)}: {how}{', compiled' if compiled else ''}: "
                    torch.testing.assert_close(
                        found, truth, rtol=1e-4, atol=1e-5, msg=lambda text, what=what: what + text
                    )


def test_the_pairs_that_models_give_are_among_them():
    found = {name: {names for names, *_ in pairs(OPS[name])} for name in ("swiglu", "add_rms_norm", "rotary_embedding")}
    assert all(("[0][0]", "[0][1]") in names for names in found.values()), found
    sums = {names for names, *_ in pairs(OPS["embedding_sum"])}
    assert {("[0][0][0]", "[0][0][1]"), ("[0][1][0]", "[0][1][1]")} <= sums
    attention = {names for names, *_ in pairs(OPS["attention"])}
    assert {("[0][0]", "[0][1]"), ("[0][0]", "[0][2]"), ("[0][1]", "[0][2]")} <= attention
