"""What the tests of every op share: copies of samples, runs with gradients, and the one rule for errors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch
from thorough import IS_THOROUGH
from torch.utils import _pytree as pytree

import fastllm
from fastllm.backends import why_not
from fastllm.bench import parity
from fastllm.registry import OPS, Op, Sample

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases(device: torch.device, *, kernels_only: bool = False) -> list[tuple[Op, str]]:
    """(op, backend) for every op and each of its backends that runs on ``device`` here."""
    return [
        (op, backend)
        for op in OPS.values()
        for backend in op.backends
        if not (kernels_only and backend == "eager") and why_not(backend, device.type, op=op) is None
    ]


# Ops that call another's operator with the same kernels: compiled, their graphs differ in the arguments' checks alone.
TWINS = {"scaled_dot_product_attention", "linear_log_probs", "geglu"}


def graph_cases(device: torch.device) -> list[tuple[Op, str]]:
    """:func:`cases` for tests that compile, which takes seconds each: twins on eager, FASTLLM_TESTS=thorough all."""
    return [(op, backend) for op, backend in cases(device) if IS_THOROUGH or backend == "eager" or op.name not in TWINS]


def backend_fixture(*names: str, op: str | None = None):
    """A fixture ``backend``: its test runs within each of ``names``, and gets the name.

    With ``op``, a backend that cannot serve that op here skips the test; without, it is an error.
    """

    @pytest.fixture(params=names)
    def backend(request, device):
        reason = None if op is None else why_not(request.param, device.type, op=OPS[op])
        if reason is not None:
            pytest.skip(reason)
        with fastllm.backend(request.param):
            yield request.param

    return backend


def case_id(value) -> str:
    return value.name if isinstance(value, Op) else str(value).removeprefix("torch.")


def leaves(sample: Sample) -> list[torch.Tensor]:
    """The sample's tensors that require grad, in order."""
    flat, _ = pytree.tree_flatten((sample.args, dict(sample.kwargs)))
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def copy(sample: Sample, dtype: torch.dtype | None = None, keep: int | None = None) -> Sample:
    """``sample`` on leaves of its own: same values and strides, floating ones in ``dtype`` if given.

    ``keep`` leaves requires_grad on that one leaf alone.
    """
    at = -1

    def leaf(x):
        nonlocal at
        if not isinstance(x, torch.Tensor):
            return x
        y = x.detach()
        # Expanded dimensions stay expanded: a clone would lay them out in full.
        narrow = y[tuple(slice(0, 1) if s == 0 else slice(None) for s in y.stride())]
        if dtype is not None and x.is_floating_point():
            narrow = narrow.to(dtype)
        if narrow.dtype == x.dtype:
            storage = x.untyped_storage()
            whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage.clone())
            y = whole.as_strided(x.shape, x.stride(), x.storage_offset())
        else:
            y = narrow.expand(x.shape)
        if x.requires_grad:
            at += 1
            y.requires_grad_(keep is None or keep == at)
        return y

    args, kwargs = pytree.tree_map(leaf, (sample.args, dict(sample.kwargs)))
    return Sample(sample.name, args, kwargs)


def outputs(result) -> list[torch.Tensor]:
    """The floating-point tensors among what an op returned."""
    flat, _ = pytree.tree_flatten(result)
    return [t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]


def sample_grad_outputs(sample_name: str, outs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients for ``outs``, the same values for the same sample whatever the dtype; rounded to bf16 to be exact."""
    generator = torch.Generator().manual_seed(len(sample_name))
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outs]
    return grads


def run(function, sample: Sample, backend: str | None = None, *, grads: bool = True):
    """``(outputs, gradients)`` of one call; gradients for every leaf that requires one, Nones included."""
    with fastllm.backend(backend) if backend else contextlib.nullcontext():
        outs = outputs(function(*sample.args, **sample.kwargs))
        if not grads:
            return outs, []
        wanted = leaves(sample)
        differentiable = [o for o in outs if o.requires_grad]
        if not wanted or not differentiable:
            return outs, [None] * len(wanted)
        given = [g for o, g in zip(outs, sample_grad_outputs(sample.name, outs), strict=True) if o.requires_grad]
        return outs, list(torch.autograd.grad(differentiable, wanted, given, allow_unused=True))


def truth_of(op, sample):
    """Computes the definition in fp64, outputs and gradients, each time it is called."""
    return lambda: run(op.reference, copy(sample, torch.float64))


class Roundings:
    """What ``run``, which computes tensors in fp64, comes to when its operators round as fp32's; drawn when asked for.

    The yardstick that no machine changes: see ``fastllm.bench.parity``.
    """

    def __init__(self, run: Callable[[], object]):
        self._run, self._draws = run, None

    def error(self, pick: Callable[[object], torch.Tensor], truth: torch.Tensor) -> float:
        """The worst of the draws, of the tensor that ``pick`` finds in what the run returns."""
        if self._draws is None:
            self._draws = parity.moved(self._run)
        return max(parity.largest_error(pick(draw).detach().double(), truth) for draw in self._draws)


def assert_as_true(
    got, truth, yardstick, dtype: torch.dtype, what: str, *, slack: float = parity.SLACK, floor: float = parity.FLOOR,
    roundings: Callable[[torch.Tensor], float] | None = None,
):  # fmt: skip
    """``got`` is at most ``slack`` times as far from ``truth`` (fp64) as ``yardstick``, plus ``floor`` eps.

    ``roundings(truth)``, for fp32, is asked for a larger yardstick where that is exceeded: ``Roundings.error``.
    Infinities and NaNs must stand in the same places.
    """
    if truth is None or got is None:
        assert got is None, f"{what}: expected no tensor"
        assert truth is None, f"{what}: expected a tensor"
        return
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if got.numel() == 0:
        return
    got, truth, yardstick = (t.detach().double() for t in (got, truth, yardstick))
    finite = truth.isfinite() & yardstick.isfinite()
    odd = ~finite
    same = (got == yardstick) | (got.isnan() & yardstick.isnan()) | (got == truth)
    assert same[odd].all(), f"{what}: infinities or NaNs differ: {got[odd][:8]} against {yardstick[odd][:8]}"
    assert got[finite].isfinite().all(), f"{what}: not finite where the truth is"
    if not finite.any():
        return
    error = (got - truth).abs()[finite]
    largest = parity.largest_error(yardstick, truth)
    allowed = parity.bound(truth[finite], largest, dtype, slack, floor)
    if roundings is not None and dtype == torch.float32 and not (error <= allowed).all():
        allowed = parity.bound(truth[finite], max(largest, roundings(truth)), dtype, slack, floor)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: error {error[worst]:.3g} exceeds {allowed[worst]:.3g} at truth {truth[finite][worst]:.6g}"
    )


def assert_all_as_true(got, run_truth, yardstick, dtype: torch.dtype, what: str, **rule):
    """As ``assert_as_true`` for what ``run`` returns: pairs of outputs and gradients.

    Args:
        run_truth: computes the pair in fp64.
        rule: ``slack`` and ``floor``.
    """
    truth = run_truth()
    roundings = Roundings(run_truth)
    for kind, name in enumerate(("output", "gradient")):
        for i, (a, b, c) in enumerate(zip(got[kind], truth[kind], yardstick[kind], strict=True)):
            at = functools.partial(roundings.error, lambda draw, kind=kind, i=i: draw[kind][i])
            assert_as_true(a, b, c, dtype, f"{what}: {name} {i}", roundings=at, **rule)
