"""The contract that every op keeps, on every backend that runs here, for every sample of its record."""

import contract
import pytest
import torch
from conftest import DEVICE, HAS_GPU
from contract import (
    DTYPES,
    assert_all_as_true,
    case_id,
    cases,
    copy,
    graph_cases,
    leaves,
    outputs,
    run,
    sample_grad_outputs,
    truth_of,
)
from thorough import IS_THOROUGH
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm
from fastllm.registry import OPS, Sample

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

CASES = cases(DEVICE)
GRAPHS = graph_cases(DEVICE)
KERNELS = cases(DEVICE, kernels_only=True)


def samples(op, dtype=torch.float32):
    torch.manual_seed(1)
    return list(op.samples(DEVICE, dtype))


def few(op, dtype=torch.float32, count=4):
    """Some samples, spread over the record, for the costlier checks."""
    every = samples(op, dtype)
    return [every[i * len(every) // count] for i in range(min(count, len(every)))]


def shared(op, backend, count):
    """:func:`few`, for what compiles: the backends that run kernels take turns with them, each has at least one.

    Above the operators a graph is the same on all of them. FASTLLM_TESTS=thorough: all on each.
    """
    kernels = [other for other_op, other in GRAPHS if other_op is op and other != "eager"]
    every = few(op, count=count)
    if IS_THOROUGH or backend == "eager":
        return every
    at = kernels.index(backend)
    return every[at :: len(kernels)] or every[-1:]


@pytest.mark.cpu_level
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_parity(op, backend, dtype, poisoned_memory):
    """Values, and eager's dtypes and shapes; gradients have their leaves'."""
    for sample in samples(op, dtype):
        # A kernel is measured against eager PyTorch. Eager PyTorch is measured against the definition at the same
        # dtype, with room for its own choices: its layer norm folds mean * rstd into one constant, which cancels.
        eager = backend == "eager"
        yardstick = run(op.reference, copy(sample)) if eager else run(op.function, copy(sample), "eager")
        got = run(op.function, copy(sample), backend)
        what = f"{op.name}/{backend}/{sample.name}"
        plain = run(op.function, copy(sample), "eager", grads=False)[0] if eager else yardstick[0]
        assert [(o.dtype, o.shape) for o in got[0]] == [(o.dtype, o.shape) for o in plain], what
        for leaf, grad in zip(leaves(sample), got[1], strict=True):
            assert grad is None or (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), what
        assert_all_as_true(got, truth_of(op, sample), yardstick, dtype, what, floor=32 if eager else 4)


@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_two_backwards_agree_and_nothing_is_overwritten(op, backend):
    for sample in few(op):
        sample = copy(sample)
        with fastllm.backend(backend):
            before = [t.detach().clone() for t in leaves(sample)]
            outs = [o for o in outputs(op.function(*sample.args, **sample.kwargs)) if o.requires_grad]
            kept = [o.detach().clone() for o in outs]
            given = sample_grad_outputs(sample.name, outs)
            given_before = [g.clone() for g in given]
            first = torch.autograd.grad(outs, leaves(sample), given, retain_graph=True, allow_unused=True)
            first_copy = [None if g is None else g.clone() for g in first]
            second = torch.autograd.grad(outs, leaves(sample), given, allow_unused=True)
        for a, b, c in zip(first, first_copy, second, strict=True):
            assert (a is None) == (c is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(c, b, rtol=0, atol=0, equal_nan=True)
        for now, then in zip([*leaves(sample), *outs, *given], [*before, *kept, *given_before], strict=True):
            torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_each_gradient_alone_equals_it_among_all(op, backend):
    for sample in few(op):
        _, together = run(op.function, copy(sample), backend)
        for i, expected in enumerate(together):
            _, (alone,) = run(op.function, copy(sample, keep=i), backend)
            if expected is None:
                assert alone is None
            else:
                torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_outputs_need_a_gradient_where_the_definitions_do(op, backend):
    """One that depends on no leaf is as frozen as PyTorch's operators leave it, whatever its neighbours are."""
    for sample in samples(op):
        for i in range(len(leaves(sample))):
            alone = copy(sample, keep=i)
            with fastllm.backend(backend):
                mine = outputs(op.function(*alone.args, **alone.kwargs))
            theirs = outputs(op.reference(*alone.args, **alone.kwargs))
            found, wanted = ([out.requires_grad for out in outs] for outs in (mine, theirs))
            assert found == wanted, f"{sample.name}, leaf {i}"


@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_upstream_gradients_of_any_layout(op, backend):
    for sample in few(op):
        sample = copy(sample)
        with fastllm.backend(backend):
            outs = [o for o in outputs(op.function(*sample.args, **sample.kwargs)) if o.requires_grad]
            for layout in (
                lambda o: o.new_full((), 0.5).expand(o.shape),
                lambda o: torch.linspace(-1, 1, 2 * o.numel(), device=o.device).to(o.dtype).view(*o.shape, 2)[..., 0],
            ):
                given = [layout(o) for o in outs]
                dense = [g.clone(memory_format=torch.contiguous_format) for g in given]
                mine = torch.autograd.grad(outs, leaves(sample), given, retain_graph=True, allow_unused=True)
                expected = torch.autograd.grad(outs, leaves(sample), dense, retain_graph=True, allow_unused=True)
                for a, b in zip(mine, expected, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def _second_order(function, sample, backend=None):
    """Gradients of the squared norm of the gradients."""
    with fastllm.backend(backend or "eager"):
        outs = [o for o in outputs(function(*sample.args, **sample.kwargs)) if o.requires_grad]
        wanted = leaves(sample)
        given = sample_grad_outputs(sample.name, outs)
        first = torch.autograd.grad(outs, wanted, given, create_graph=True, allow_unused=True, materialize_grads=True)
        total = sum(g.square().sum() for g in first)
        if not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in wanted]
        return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.cpu_level
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=case_id)
def test_double_backward_is_right(op, backend):
    for sample in few(op):

        def truth(sample=sample):
            return [], _second_order(op.reference, copy(sample, torch.float64))

        yardstick = _second_order(op.reference, copy(sample))
        mine = _second_order(op.function, copy(sample), backend)
        # The kernel's first-order gradient enters squared: its allowed error counts once more.
        what = f"{op.name}/{sample.name}: second order"
        assert_all_as_true(([], mine), truth, ([], yardstick), torch.float32, what, slack=4, floor=64)


@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=case_id)
def test_functorch_grad_equals_autograd(op, backend):
    for sample in few(op, count=2):
        sample = copy(sample)
        _, expected = run(op.function, sample, backend)
        wanted = leaves(sample)
        if not wanted or any(g is None for g in expected):
            continue

        def loss(*values, sample=sample, wanted=wanted):
            swap = {id(old): new for old, new in zip(wanted, values, strict=True)}
            args, kwargs = contract.pytree.tree_map(lambda x: swap.get(id(x), x), (sample.args, dict(sample.kwargs)))
            outs = [o for o in outputs(op.function(*args, **kwargs))]
            return sum((o * g).sum() for o, g in zip(outs, sample_grad_outputs(sample.name, outs), strict=True))

        with fastllm.backend(backend):
            got = torch.func.grad(loss, argnums=tuple(range(len(wanted))))(*[w.detach() for w in wanted])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


class _Recorder(TorchDispatchMode):
    """The calls of fastllm's registered operators, with detached copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastllm":
            detached = contract.pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args)
            self.calls.append((func, detached, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "backend"), [case for case in GRAPHS if case in KERNELS], ids=case_id)
def test_opcheck(op, backend):
    seen = 0
    wide, narrow = few(op), few(op, torch.bfloat16)
    # Each runs an operator a dozen times: the samples take turns with the dtype.
    for sample in (*wide[::2], *narrow[1::2]):
        with _Recorder() as recorder:
            run(op.function, copy(sample), backend)
        for func, args, kwargs in recorder.calls:
            torch.library.opcheck(func, args, kwargs)
            seen += 1
    assert seen >= 2, "no registered operator was called"


@pytest.mark.parametrize(("op", "backend"), GRAPHS, ids=case_id)
def test_compiles_whole_with_dynamic_shapes(op, backend):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sample in shared(op, backend, count=2 if backend == "eager" else 4):
        expected_out, expected = run(op.function, copy(sample), backend)
        got_out, got = run(compiled, copy(sample), backend)
        for a, b in zip([*got_out, *got], [*expected_out, *expected], strict=True):
            assert (a is None) == (b is None), sample.name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), GRAPHS, ids=case_id)
def test_compiles_whole_where_nothing_is_differentiated(op, backend):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for sample in shared(op, backend, count=2):
            expected, _ = run(op.function, copy(sample), backend, grads=False)
            got, _ = run(compiled, copy(sample), backend, grads=False)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=case_id)
def test_repeats_bit_for_bit(op, backend):
    for sample in few(op):
        first = run(op.function, copy(sample), backend)
        for _ in range(2 if HAS_GPU else 1):  # the interpreter runs one program after another
            again = run(op.function, copy(sample), backend)
            for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_meta_tensors_give_shapes(op):
    for sample in few(op):
        args, kwargs = contract.pytree.tree_map_only(
            torch.Tensor, lambda x: x.detach().to("meta"), (sample.args, dict(sample.kwargs))
        )
        expected, _ = run(op.function, copy(sample), "eager", grads=False)
        got = outputs(op.function(*args, **kwargs))
        assert [(o.shape, o.dtype, o.device.type) for o in got] == [(o.shape, o.dtype, "meta") for o in expected]


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_fake_tensors_pass_forward_and_backward(op):
    for sample in map(copy, few(op)):
        with FakeTensorMode() as mode:
            args, kwargs = contract.pytree.tree_map_only(
                torch.Tensor, mode.from_tensor, (sample.args, dict(sample.kwargs))
            )
            outs = [o for o in outputs(op.function(*args, **kwargs)) if o.requires_grad]
            wanted = leaves(Sample(sample.name, args, kwargs))
            grads = torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs], allow_unused=True)
        for leaf, grad in zip(wanted, grads, strict=True):
            assert grad is None or (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("op", OPS.values(), ids=case_id)
def test_record_is_whole(op):
    assert op.summary
    assert op.function.__name__ == op.name
    assert getattr(fastllm.functional, op.name) is op.function
    assert op.function.__doc__
    assert op.backends[0] == "eager"
    if op.module is not None:
        assert getattr(fastllm.nn, op.module.__name__) is op.module
    for sample in samples(op):
        cost = op.cost(*sample.args, **sample.kwargs)
        assert min(cost.forward_bytes, cost.backward_bytes, cost.forward_flops, cost.backward_flops) >= 0
