"""vmap, forward mode and batched gradients through every op: the definition's values, by whatever serves the call."""

import contract
import pytest
import torch
from conftest import DEVICE
from contract import case_id, cases, copy, leaves, outputs, sample_grad_outputs

import fastllm
from fastllm.registry import OPS

# vmap says so of each of our operators that it runs once for each of its slices.
pytestmark = [
    pytest.mark.runs_on("gpu", "interpreter"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, which torch's forward mode starts
]
KERNELS = cases(DEVICE, kernels_only=True)


def calls(op, count=3):
    """(function of the sample's leaves, the same of the reference, the leaves' values)."""
    torch.manual_seed(1)
    every = [s for s in op.samples(DEVICE, torch.float32) if leaves(s) and all(leaf.numel() for leaf in leaves(s))]
    # Softmax of logits in the thousands magnifies fp32's rounding beyond any tolerance worth having.
    every = [s for s in every if s.name != "large_logits"]
    for sample in every[:: max(1, len(every) // count)]:
        sample = copy(sample)
        wanted = leaves(sample)

        def bind(function, sample=sample, wanted=wanted):
            def call(*values):
                swap = {id(old): new for old, new in zip(wanted, values, strict=True)}
                args, kwargs = contract.pytree.tree_map(
                    lambda x: swap.get(id(x), x), (sample.args, dict(sample.kwargs))
                )
                return tuple(outputs(function(*args, **kwargs)))

            return call

        yield sample.name, bind(op.function), bind(op.reference), [leaf.detach().contiguous() for leaf in wanted]


def close(got, expected, name):
    flat = (contract.pytree.tree_leaves(x) for x in (got, expected))
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_forward_mode(op):
    for name, mine, theirs, values in calls(op):
        tangents = tuple(torch.randn_like(v) for v in values)
        got = torch.func.jvp(mine, tuple(values), tangents)
        close(got, torch.func.jvp(theirs, tuple(values), tangents), name)


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_gradients_of_forward_mode(op):
    for name, mine, theirs, values in calls(op):
        tangents = tuple(torch.randn_like(v) for v in values)

        def pulled(function, values=values, tangents=tangents):
            out, pull = torch.func.vjp(lambda *x: torch.func.jvp(function, x, tangents)[1], *values)
            return pull(tuple(torch.ones_like(o) for o in out))

        close(pulled(mine), pulled(theirs), name)


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_vmap_and_its_gradients(op):
    for name, mine, theirs, values in calls(op):
        batched = [torch.stack([v, v * 0.5, v + 1]) for v in values]
        expected = [theirs(*each) for each in zip(*batched, strict=True)]
        close(torch.func.vmap(mine)(*batched), tuple(torch.stack(each) for each in zip(*expected, strict=True)), name)

        def loss(function):
            return lambda *leaves: sum(o.square().sum() for o in function(*leaves))

        every = tuple(range(len(values)))
        got = torch.func.vmap(torch.func.grad(loss(mine), every))(*batched)
        each = [torch.func.grad(loss(theirs), every)(*one) for one in zip(*batched, strict=True)]
        close(got, tuple(torch.stack(x) for x in zip(*each, strict=True)), name)


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_batched_gradients_of_one_forward(op):
    for name, mine, theirs, values in calls(op):
        given = sample_grad_outputs(name, list(theirs(*values)))
        batched = tuple(torch.stack([g, g * 2]) for g in given)
        _, pull = torch.func.vjp(mine, *values)
        _, pull_theirs = torch.func.vjp(theirs, *values)
        close(torch.func.vmap(pull)(batched), torch.func.vmap(pull_theirs)(batched), name)
        mine_leaves = [v.clone().requires_grad_() for v in values]
        outs = [(o, g) for o, g in zip(mine(*mine_leaves), batched, strict=True) if o.requires_grad]
        got = torch.autograd.grad([o for o, _ in outs], mine_leaves, [g for _, g in outs], is_grads_batched=True)
        close(got, torch.func.vmap(pull_theirs)(batched), name)


@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=case_id)
def test_gradients_of_gradients_are_asked_for_when_their_transform_is_over(op, backend):
    """Tensors that a gradient closed over are wrappers that have outlived their transform by then."""
    for name, mine, theirs, values in calls(op, count=4):
        given = sample_grad_outputs(name, list(theirs(*values)))

        def pulled(function, given=given, values=values):
            found, pull = torch.func.vjp(lambda *x: torch.func.vjp(function, *x)[1](tuple(given)), *values)
            return pull(tuple(torch.ones_like(x) for x in found))

        expected = pulled(theirs)
        with fastllm.backend(backend):
            close(pulled(mine), expected, name)


@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=case_id)
def test_kernels_refuse(op, backend):
    _, mine, _, values = next(calls(op))
    with fastllm.backend(backend), pytest.raises(fastllm.BackendError, match="vmap"):
        torch.func.vmap(mine)(*[v[None] for v in values])


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_cross_entropy_of_each_row_alone(backend, options):
    """Rows of logits with a target of no dimensions, and class weights: one loss, one gradient for each."""
    x, target = torch.randn(4, 5, device=DEVICE), torch.tensor([2, 0, 4, 1], device=DEVICE)
    options = {**options, "weight": torch.rand(5, device=DEVICE) + 0.5}

    def loss(x, target):
        return fastllm.functional.cross_entropy(x, target, **options)

    with fastllm.backend(backend):
        grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(x, target)
        torch.testing.assert_close(torch.func.vmap(loss)(x, target), losses)
        for row, y, grad, value in zip(x, target, grads, losses, strict=True):
            row = row.clone().requires_grad_()
            alone = loss(row, y)
            torch.testing.assert_close(value, alone.detach())
            torch.testing.assert_close(grad, torch.autograd.grad(alone, row)[0])
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[0], target[0]), losses[0])


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_functionalize(op):
    """Of every tensor among the arguments, so that values which the host reads have no memory there."""
    for sample in op.samples(DEVICE, torch.float32):
        flat, spec = contract.pytree.tree_flatten((sample.args, dict(sample.kwargs)))
        at = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]

        def call(*values, flat=flat, spec=spec, at=at):
            swap = dict(zip(at, values, strict=True))
            args, kwargs = contract.pytree.tree_unflatten([swap.get(i, old) for i, old in enumerate(flat)], spec)
            torch.manual_seed(2)
            return tuple(outputs(op.function(*args, **kwargs)))

        values = [flat[i].detach() for i in at]
        close(torch.func.functionalize(call)(*values), call(*values), sample.name)
