"""Whether a provider computes what the op's reference defines, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils._pytree import tree_map_only

from ..registry import Op, Sample
from . import cases

# The rule that every kernel keeps: at most SLACK times eager's own error, plus FLOOR eps.
SLACK, FLOOR = 2.0, 4.0

Tensors = list[torch.Tensor | None]


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


def upstream(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
    grads = cases.backward(outputs, leaves, upstream(outputs)) if leaves else ()
    return [*(y.detach() for y in outputs), *grads]


class Judge:
    """The truth of one call, and how far eager PyTorch is from it."""

    def __init__(self, op: Op, eager: Callable, sample: Sample, dtype: torch.dtype):
        self.sample, self.dtype = sample, dtype
        self.truth = results(cases.reference_of(op), widened(sample, truth_dtype(dtype)))
        yardstick = results(eager, sample)
        self.allowed = [None if t is None else self._error(y, t) for y, t in zip(yardstick, self.truth, strict=True)]

    @staticmethod
    def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
        finite = truth.isfinite() & got.isfinite()
        error = torch.where(finite, (got.to(truth.dtype) - truth).abs(), 0)
        return float(error.max()) if error.numel() else 0.0

    def problem(self, function: Callable) -> str | None:
        """Why ``function`` is wrong, or None."""
        got = results(function, self.sample)
        if len(got) != len(self.truth):
            return f"gives {len(got)} outputs and gradients, expected {len(self.truth)}"
        for i, (value, truth, allowed) in enumerate(zip(got, self.truth, self.allowed, strict=True)):
            if truth is None or value is None:
                if truth is not value:
                    return f"result {i}: {'none' if value is None else 'a tensor'}, expected the other"
                continue
            if value.shape != truth.shape:
                return f"result {i}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
            if not torch.equal(value.isfinite(), truth.isfinite()):
                return f"result {i}: infinities or NaNs in other places"
            bound = SLACK * allowed + FLOOR * torch.finfo(self.dtype).eps * truth.abs().clamp(min=1.0)
            error = torch.where(truth.isfinite(), (value.to(truth.dtype) - truth).abs(), 0)
            if not bool((error <= bound).all()):
                worst = float(error.max())
                return f"result {i}: error {worst:.2e}, eager's own is {allowed:.2e}"
        return None
