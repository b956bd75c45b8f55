"""SwiGLU: silu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6, without its linear layers)."""

from __future__ import annotations

import torch

from ..registry import Op, register
from .gated import gated, gated_cost, gated_exception, gated_reference, gated_samples


def swiglu_reference(gate, up=None):
    """The definition, in at least fp32, rounded once."""
    return gated_reference(gate, up, "silu")


def swiglu(gate, up=None):
    """``silu(gate) * up``, fused: each tensor is moved once, either way.

    Args:
        gate: floating point, any shape and strides. Without ``up`` it holds both, (..., 2 N): the gate first, as one
            linear layer for the two leaves them; so does its gradient, which then needs no concatenation.
        up: of the gate's shape, or None. Its dtype may differ.

    Returns:
        A tensor of the gate's shape (without ``up``: (..., N)), in the dtype that gate and up promote to. Computed in
        fp32 at least, rounded once.

    Raises:
        TypeError: ``gate`` or ``up`` is not a floating-point tensor.
        ValueError: shapes or devices do not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    return gated("swiglu", gate, up, "silu")


class SwiGLU(torch.nn.Module):
    """:func:`swiglu` as a module: ``forward(gate, up=None)``."""

    def forward(self, gate, up=None):
        return swiglu(gate, up)


register(
    Op(
        name="swiglu",
        summary="silu(gate) * up, of two tensors or of the halves of one",
        function=swiglu,
        reference=swiglu_reference,
        samples=gated_samples,
        cost=gated_cost,
        backends=("eager", "triton", "native"),
        module=SwiGLU,
        exception=gated_exception("silu"),
    )
)
