"""The rule for errors that kernels and providers keep, and whether a provider keeps it before it is timed.

A result may be SLACK times as far from the fp64 truth as a yardstick is, plus FLOOR eps. The yardstick is eager
PyTorch's own error here. That error is one draw: another BLAS sums in another order, and may be lucky where eager
PyTorch has few roundings to make. So nothing is called wrong in fp32 before a second yardstick, which no machine
changes, has been asked: the worst that the definition itself, in fp64, comes to when the result of each of its
operators, and each term of a product of matrices, is moved by one unit in the last place of fp32, up or down at random
(Monte Carlo arithmetic: D. S. Parker, 1997). It is drawn only where the first one is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..registry import Op, Sample
from . import cases

# The rule for numbers (docs/numerics.md): at most SLACK times eager's own error, plus FLOOR eps.
SLACK, FLOOR = 2.0, 4.0
# Runs with moved results of which the worst counts: in one of four, a sum's roundings seldom cancel.
DRAWS = 4

Tensors = list[torch.Tensor | None]

# Operators that only move numbers about, and so round nothing.
_COPIES = frozenset(
    (
        *(
            "_to_copy",
            "clone",
            "copy",
            "copy_",
            "cat",
            "stack",
            "where",
            "index",
            "index_select",
            "gather",
            "embedding",
        ),
        *("masked_fill", "masked_fill_", "fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like"),
        *("full", "full_like", "empty", "empty_like", "new_zeros", "new_empty", "new_full", "scalar_tensor"),
        *("constant_pad_nd", "repeat", "flip", "roll", "tril", "triu", "max", "min", "amax", "amin", "sort", "topk"),
        *("maximum", "minimum", "neg", "abs", "relu"),
    )
)

# Products of matrices, and which argument is the first factor. A product rounds each of its terms: where they cancel,
# the rounding of the sum alone says too little.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


class _Moved(TorchDispatchMode):
    """Every result in fp64 of an operator that rounds is multiplied by 1 + ``step`` or 1 - ``step``, at random.

    So is every element of the first factor of a product of matrices.
    """

    def __init__(self, step: float, seed: int):
        super().__init__()
        self._step, self._seed, self._generators = step, seed, {}

    def _move(self, t: torch.Tensor) -> None:
        if t.dtype != torch.float64 or t.numel() == 0:
            return
        generator = self._generators.get(t.device)
        if generator is None:
            generator = self._generators[t.device] = torch.Generator(t.device).manual_seed(self._seed)
        signs = torch.randint(0, 2, t.shape, generator=generator, device=t.device, dtype=torch.float64)
        t.mul_(signs.mul_(2).sub_(1).mul_(self._step).add_(1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        factor = _PRODUCTS.get(name)
        if factor is not None:
            moved = args[factor].clone()
            self._move(moved)
            args = (*args[:factor], moved, *args[factor + 1 :])
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in _COPIES:
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self._move(t)
        return result


def moved(run: Callable[[], object]) -> list:
    """What ``run``, a computation in fp64, gives when its operators round as fp32 does: ``DRAWS`` results."""
    results = []
    for seed in range(DRAWS):
        with _Moved(torch.finfo(torch.float32).eps, seed):
            results.append(run())
    return results


def largest_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest distance from ``truth`` where both are finite."""
    finite = truth.isfinite() & got.isfinite()
    error = torch.where(finite, (got.to(truth.dtype) - truth).abs(), 0)
    return float(error.max()) if error.numel() else 0.0


def bound(
    truth: torch.Tensor, yardstick: float, dtype: torch.dtype, slack: float = SLACK, floor: float = FLOOR
) -> torch.Tensor:
    """How far each element may be from ``truth``; ``yardstick`` is the largest error of what is known to be right."""
    return slack * yardstick + floor * torch.finfo(dtype).eps * truth.abs().clamp(min=1.0)


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """Wide enough to judge ``dtype`` by: fp64 for fp32, fp32 for 16 bits."""
    return torch.float64 if torch.finfo(dtype).bits >= 32 else torch.float32


def widened(sample: Sample, dtype: torch.dtype) -> Sample:
    """The call with its floating tensors in ``dtype``, as leaves."""

    def leaf(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    args, kwargs = tree_map_only(torch.Tensor, leaf, (sample.args, dict(sample.kwargs)))
    return Sample(sample.name, args, kwargs)


def seeded_grad_outputs(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients for ``outputs``, the same for equal shapes; fine in every dtype (multiples of 1/16 below 1)."""
    grads = []
    for y in outputs:
        generator = torch.Generator(y.device).manual_seed(0)
        values = torch.randint(-15, 16, y.shape, generator=generator, device=y.device)
        grads.append((values / 16).to(y.dtype))
    return grads


def results(function: Callable, sample: Sample) -> Tensors:
    """Outputs and gradients of one call; each one's dropout starts from the same seed."""
    torch.manual_seed(0)
    sample = cases.own_tensors(function, sample)
    outputs = cases.forward(function, sample)
    leaves = cases.differentiable(sample)
    grads = cases.backward(outputs, leaves, seeded_grad_outputs(outputs)) if leaves else ()
    return [*(y.detach() for y in outputs), *grads]


class Judge:
    """The truth of one call, and how far eager PyTorch is from it."""

    def __init__(self, op: Op, eager: Callable, sample: Sample, dtype: torch.dtype):
        self.sample, self.dtype = sample, dtype
        self._reference = cases.reference_of(op)
        self.truth = self._true()
        yardstick = results(eager, sample)
        # A result that eager does not have either is None.
        self.allowed = [
            None if t is None or y is None else largest_error(y, t) for y, t in zip(yardstick, self.truth, strict=True)
        ]
        self._moved: list[Tensors] | None = None

    def _true(self) -> Tensors:
        return results(self._reference, widened(self.sample, truth_dtype(self.dtype)))

    def _of_roundings(self, i: int) -> float:
        """The second yardstick of result ``i``; nothing for 16 bits, whose own eps is the larger by far."""
        if self.dtype != torch.float32:
            return 0.0
        if self._moved is None:
            self._moved = moved(self._true)
        pairs = ((run[i], self.truth[i]) for run in self._moved)
        return max(largest_error(got, truth) for got, truth in pairs if got is not None and truth is not None)

    def problem(self, function: Callable) -> str | None:
        """Why ``function`` is wrong, or None."""
        return self.problem_of(results(function, self.sample))

    def problem_of(self, got: Tensors) -> str | None:
        """Why ``got``, outputs and gradients of one call as :func:`results` gives them, are wrong, or None."""
        if len(got) != len(self.truth):
            return f"gives {len(got)} outputs and gradients, expected {len(self.truth)}"
        for i, (value, truth, allowed) in enumerate(zip(got, self.truth, self.allowed, strict=True)):
            if truth is None or value is None:
                if truth is not value:
                    return f"result {i}: {'none' if value is None else 'a tensor'}, expected the other"
                continue
            assert allowed is not None, "eager has what the reference has"
            if value.shape != truth.shape:
                return f"result {i}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
            if not torch.equal(value.isfinite(), truth.isfinite()):
                return f"result {i}: infinities or NaNs in other places"
            error = torch.where(truth.isfinite(), (value.to(truth.dtype) - truth).abs(), 0)
            if bool((error <= bound(truth, allowed, self.dtype)).all()):
                continue
            roundings = self._of_roundings(i)
            if not bool((error <= bound(truth, max(allowed, roundings), self.dtype)).all()):
                worst = float(error.max())
                return f"result {i}: error {worst:.2e}, eager's own is {allowed:.2e}, roundings' {roundings:.2e}"
        return None
