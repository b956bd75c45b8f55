"""GEGLU: gelu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6, without its linear layers)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..registry import Op, register
from .gated import gated, gated_cost, gated_exception, gated_reference, gated_samples

_KINDS = {"none": "gelu", "tanh": "gelu_tanh"}


def _kind(approximate: str) -> str:
    if approximate not in _KINDS:
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _KINDS[approximate]


def geglu_reference(gate, up=None, *, approximate="none"):
    """The definition, in at least fp32, rounded once."""
    return gated_reference(gate, up, _kind(approximate))


def geglu(gate, up=None, *, approximate="none"):
    """``gelu(gate, approximate=approximate) * up``, fused: each tensor is moved once, either way.

    Args:
        gate, up: as in :func:`fastllm.functional.swiglu`, the halves of one tensor included.
        approximate: "none" (by erf) or "tanh", as in ``torch.nn.functional.gelu``.

    Returns:
        As :func:`fastllm.functional.swiglu`.

    Raises:
        TypeError: ``gate`` or ``up`` is not a floating-point tensor.
        ValueError: shapes, devices or ``approximate`` do not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    return gated("geglu", gate, up, _kind(approximate))


class GEGLU(torch.nn.Module):
    """:func:`geglu` as a module: ``forward(gate, up=None)``."""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        _kind(approximate)
        self.approximate = approximate

    def forward(self, gate, up=None):
        return geglu(gate, up, approximate=self.approximate)

    def extra_repr(self):
        return f"approximate={self.approximate!r}"


def _samples(device, dtype):
    for i, sample in enumerate(gated_samples(device, dtype)):
        approximate = ("none", "tanh")[i % 2]
        yield replace(sample, name=f"{sample.name}_{approximate}", kwargs={"approximate": approximate})


register(
    Op(
        name="geglu",
        summary="gelu(gate) * up, of two tensors or of the halves of one; exact or by tanh",
        function=geglu,
        reference=geglu_reference,
        samples=_samples,
        cost=gated_cost,
        backends=("eager", "triton", "native"),
        module=GEGLU,
        exception=gated_exception("gelu", "gelu_tanh"),
    )
)
