"""The base class of the scripts of ``fastllm bench export kernels``. It needs Hugging Face's package kernels."""

from __future__ import annotations

from importlib import import_module

import torch

from ..registry import OPS, Sample
from . import cases


class OpBenchmark(import_module("kernels.benchmark").Benchmark):
    """One op, whose function of the same name in the kernel takes the op's arguments. A script gives it its shapes."""

    seed = 0
    op: str
    dtype: str

    def __init__(self):
        self._results: list[torch.Tensor] = []
        self._sample = Sample("")
        super().__init__()

    @property
    def out(self) -> torch.Tensor:
        """All results as one tensor; the runner compares no more than one."""
        return torch.cat([t.flatten() for t in self._results])

    @out.setter
    def out(self, value: None) -> None:
        self._results = []

    def make(self, shape: str) -> None:
        """The call of one shape, without gradients."""
        device = torch.device(self.device)
        sample = cases.shapes_of(self.op, device.type)[shape](device, getattr(torch, self.dtype))
        for tensor in cases.tensors_of(sample):
            tensor.requires_grad_(False)
        self._sample = sample

    def call(self) -> None:
        """One call of the kernel."""
        self._results = cases.forward(getattr(self.kernel, self.op), self._sample)

    def expected(self) -> torch.Tensor:
        """The results of the op's reference."""
        return torch.cat([t.flatten() for t in cases.forward(OPS[self.op].reference, self._sample)])
