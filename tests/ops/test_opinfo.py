"""PyTorch's own samples (OpInfo) through our functions: same outputs, same gradients, errors where torch has errors."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, HAS_GPU
from contract import DTYPES, Roundings, assert_as_true, case_id, cases
from thorough import IS_THOROUGH
from torch.testing._internal.common_methods_invocations import op_db

import fastllm
from fastllm.registry import OPS

# torch's own says so of every sample whose options it does not take.
pytestmark = [
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
    pytest.mark.runs_on("gpu", "interpreter"),
    pytest.mark.cpu_level,
]

INFOS = {info.name.removeprefix("nn.functional."): info for info in op_db if info.name.startswith("nn.functional.")}
# Aliases of the same function under several OpInfos do not occur among ours.
CASES = [(op, backend) for op, backend in cases(DEVICE) if op.name in INFOS]


@pytest.mark.runs_on("anywhere")
def test_every_op_that_torch_has_is_here():
    assert {name for name in OPS if hasattr(F, name)} <= set(INFOS) | {"linear_cross_entropy"}


def _in_opinfos_order(name, function):
    """OpInfo puts the differentiated argument first; torch's embedding takes the ids first."""
    if name == "embedding":
        return lambda weight, ids, **kwargs: function(ids, weight, **kwargs)
    return function


def _plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The formula of torch's documentation, every step in the inputs' dtype."""
    t = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        t = t.masked_fill(torch.ones(t.shape[-2:], dtype=torch.bool, device=t.device).tril().logical_not(), -torch.inf)
    return torch.softmax(t if attn_mask is None else t + attn_mask, -1) @ value


def _fused_attention(query, key, value, attn_mask=None, **kwargs):
    """torch's own with four dimensions, where it takes its fused kernel."""
    rank = max(query.dim(), key.dim())
    query, key, value = (x.expand(*[1] * (4 - rank), *key.shape[: -x.dim()], *x.shape) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
    return out.reshape(out.shape[4 - rank :])


def _backwards(attention):
    """The same with every sum over a head dim in the opposite order: how far rounding alone takes it is luck."""

    def reordered(query, key, value, *args, **kwargs):
        return attention(query.flip(-1), key.flip(-1), value.flip(-1), *args, **kwargs).flip(-1)

    return reordered


# Further eager computations beside torch's own; the least exact of all is the yardstick. torch's own attention below
# four dimensions, or with a mask's gradient, computes 16-bit inputs in fp32 and keeps every score. Fused kernels round
# the probabilities to the inputs' dtype and take sum(p * dp) from the output; they are measured by others that do.
_ATTENTIONS = (_plain_attention, _fused_attention)
PLAIN = {
    "scaled_dot_product_attention": (*_ATTENTIONS, *map(_backwards, (F.scaled_dot_product_attention, *_ATTENTIONS)))
}


def _less_exact(first, second, truth):
    def error(x, true):
        return 0.0 if x is None or not x.numel() else (x.double() - true).abs().nan_to_num(0.0).max().item()

    return first if error(first, truth) >= error(second, truth) else second


def _random(sample) -> bool:
    return sample.kwargs.get("dropout_p", 0.0) > 0.0


def _leaves(sample):
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def _run(function, sample, dtype=None, backend=None):
    """``(output, gradients)`` on leaves in ``dtype``, or as they are."""
    cast = {}

    def leaf(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in cast:
            y = x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()
            cast[id(x)] = y.requires_grad_(x.requires_grad)
        return cast[id(x)]

    args = [leaf(a) for a in (sample.input, *sample.args)]
    kwargs = {k: leaf(v) for k, v in sample.kwargs.items()}
    if dtype == torch.float64:
        kwargs.pop("options", None)  # how torch's own is to sum 16-bit inputs; in fp64 it refuses them
    with fastllm.backend(backend) if backend else contextlib.nullcontext():
        out = function(*args, **kwargs)
        wanted = [leaf(t) for t in _leaves(sample)]
        grads = torch.autograd.grad(out.sum(), wanted, allow_unused=True) if wanted and out.requires_grad else []
    return out, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("op", "backend"), CASES, ids=case_id)
def test_samples(op, backend, dtype):
    ours, theirs = (_in_opinfos_order(op.name, f) for f in (op.function, getattr(F, op.name)))
    served = 0
    every = [s for s in INFOS[op.name].sample_inputs(DEVICE, dtype, requires_grad=True) if not _random(s)]
    if backend == "triton" and not (HAS_GPU or IS_THOROUGH) and len(every) > 8:
        # In the interpreter the 16-bit dtypes share the samples, all of which fp32 takes.
        every = every[{torch.float16: 0, torch.bfloat16: 1}.get(dtype, 0) :: 1 if dtype == torch.float32 else 2]
    for sample in every:
        truth = _run(theirs, sample, torch.float64)
        yardstick = _run(theirs, sample)
        for other in PLAIN.get(op.name, ()):
            out, grads = _run(other, sample)
            yardstick = (
                _less_exact(yardstick[0], out, truth[0]),
                [_less_exact(*each) for each in zip(yardstick[1], grads, truth[1], strict=True)],
            )
        try:
            got = _run(ours, sample, backend=backend)
        except fastllm.BackendError:
            assert backend != "eager"
            continue
        served += 1
        what = f"{op.name}/{backend} {tuple(sample.input.shape)} {sample.args} {sample.kwargs}"
        assert got[0].dtype == yardstick[0].dtype, what
        # Scores of some hundreds in fp32: how near one order of sums comes to the truth is luck.
        definition = PLAIN.get(op.name, (theirs,))[0]
        roundings = Roundings(lambda definition=definition, sample=sample: _run(definition, sample, torch.float64))

        def drawn(pick, roundings=roundings):
            return lambda exact: roundings.error(pick, exact)

        assert_as_true(got[0], truth[0], yardstick[0], dtype, what, roundings=drawn(lambda run: run[0]))
        for i, (mine, true, stick) in enumerate(zip(got[1], truth[1], yardstick[1], strict=True)):
            assert_as_true(mine, true, stick, dtype, what, roundings=drawn(lambda run, i=i: run[1][i]))
    assert served >= 3


@pytest.mark.parametrize("op", {op.name: op for op, _ in CASES}.values(), ids=case_id)
def test_float64_samples_are_torchs_own(op):
    ours, theirs = (_in_opinfos_order(op.name, f) for f in (op.function, getattr(F, op.name)))
    for sample in INFOS[op.name].sample_inputs(DEVICE, torch.float64, requires_grad=True):
        if _random(sample):
            continue
        got, expected = _run(ours, sample), _run(theirs, sample)
        torch.testing.assert_close(got[0], expected[0], equal_nan=True)
        for a, b in zip(got[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


WITH_ERRORS = [op for op in OPS.values() if op.name in INFOS and INFOS[op.name].error_inputs_func is not None]


@pytest.mark.parametrize("op", WITH_ERRORS, ids=case_id)
def test_what_torch_refuses_is_refused(op):
    errors = list(INFOS[op.name].error_inputs(DEVICE))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            _in_opinfos_order(op.name, op.function)(sample.input, *sample.args, **sample.kwargs)
