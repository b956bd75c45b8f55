"""The norms in PyTorch's own operators: the definition, and what serves a call as the backend ``eager``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import forward_mode
from ..shared.dropout import dropout
from ..shared.philox import draw_seed, first_row_of
from ..shared.sharded import agreed
from ..shared.widened import NARROW
from .call import NormCall


def norm_reference(call: NormCall) -> torch.Tensor:
    """The definition of both norms, of ``call.input`` in at least fp32, rounded once to the input's dtype."""
    wide = torch.promote_types(call.input.dtype, torch.float32)
    dims = tuple(range(-len(call.shape), 0))
    x = call.input.to(wide)
    if call.center:
        # Twice, so that the mean of equal numbers is that number: the first one's rounding error grows with the mean.
        mean = x.mean(dims, keepdim=True)
        x = x - (mean + (x - mean).mean(dims, keepdim=True))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + call.eps)
    if call.weight is not None:
        y = y * (call.weight.to(wide) + call.weight_offset)
    if call.bias is not None:
        y = y + call.bias.to(wide)
    return y.to(call.input.dtype)


def branch_seed(call: NormCall) -> torch.Tensor:
    """A seed of the dropout of ``call.input``, whose rows are those that are normed."""
    rows = call.input.shape[: call.input.dim() - len(call.shape)]
    return agreed(draw_seed(call.input.device, first_row_of(rows, call.first_row)), call.input)


def added(call: NormCall) -> torch.Tensor:
    """residual + dropout(input), in at least fp32, rounded once to the residual's dtype."""
    input, residual = call.input, call.residual
    assert residual is not None, "an add norm has a residual"
    if call.dropout_p == 0.0 and input.dtype == residual.dtype:
        return residual + input  # PyTorch's own add of 16-bit numbers is in fp32, rounded once
    wide = torch.promote_types(torch.promote_types(input.dtype, residual.dtype), torch.float32)
    branch = input.to(wide)
    if call.dropout_p > 0.0:
        rows = branch.flatten(-len(call.shape))
        branch = dropout(rows, branch_seed(call), call.dropout_p).view(branch.shape)
    return (residual.to(wide) + branch).to(residual.dtype)


def add_norm_reference(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of both add norms: (y, h), each rounded once. y is the norm of h as rounded."""
    h = added(call)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return norm_reference(call.of(wide)).to(call.input.dtype), h


def eager_norm(call: NormCall) -> torch.Tensor:
    """The norm of ``call.input``: PyTorch's own operator wherever it takes these dtypes, else the definition."""
    dtypes = {p.dtype for p in (call.weight, call.bias) if p is not None}
    mixed = bool(dtypes - {call.input.dtype})
    if call.center:
        # torch.nn.functional.layer_norm takes fp32 parameters beside 16-bit rows on a CPU alone, and no bias alone.
        taken = call.weight is not None and dtypes == {torch.float32} and call.input.dtype in NARROW
        taken = taken and call.input.device.type == "cpu"
        # The gradient of PyTorch's forward-mode derivative is not right (2.13): of layer_norm's input it is not 0 for a
        # tangent and an upstream gradient of equal numbers.
        if call.weight_offset != 0.0 or (mixed and not taken) or forward_mode():
            return norm_reference(call)
        weight = call.weight
        if weight is None and call.bias is not None:
            # The gradient of PyTorch's gradient fails for a bias alone (2.13). The same bits without gradients.
            weight = torch.ones_like(call.bias)
        return F.layer_norm(call.input, call.shape, weight, call.bias, call.eps)
    # torch.nn.functional.rms_norm would warn of mixed dtypes at every call.
    if call.weight_offset != 0.0 or mixed:
        return norm_reference(call)
    return F.rms_norm(call.input, call.shape, call.weight, call.eps)


def eager_add_norm(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of an add norm, by :func:`eager_norm`."""
    h = added(call)
    return eager_norm(call.of(h)).to(call.input.dtype), h
