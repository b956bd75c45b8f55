"""Norms by behaviour: what class a norm has does not matter, only what its forward computes, which is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..functional import layer_norm, rms_norm
from ..ops.norm.native import takes_rms, undropped_norm
from ..ops.shared.widened import NARROW
from .calls import own, watched
from .deferred import value_of
from .plain import only_input, plain
from .probe import Attributes, changed
from .swap import forward_of


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension, as found: names of attributes, the formula, and which dtypes give which.

    ``dtypes`` holds (input, weight, output) triples that were tried; None for the weight where there is none.
    ``attributes`` are the module's others when it was measured, on which its forward may depend.
    ``narrow_inside``: it squares or takes roots of 16-bit tensors, which autocast would widen. ``vectors``: it takes an
    input of one dimension as a row.
    """

    center: bool
    weight: str | None
    bias: str | None
    eps: str | float
    offset: float
    argument: str
    dtypes: tuple[tuple[torch.dtype, torch.dtype | None, torch.dtype], ...]
    attributes: Attributes
    narrow_inside: bool
    vectors: bool

    @property
    def op(self) -> str:
        return "layer_norm" if self.center else "rms_norm"

    def __str__(self):
        scale = f" * ({self.offset:g} + {self.weight})" if self.offset else " * weight"
        scale = "" if self.weight is None else scale
        shift = "" if self.bias is None else f" + {self.bias}"
        return f"{'(x - mean) / std' if self.center else 'x / rms'}{scale}{shift}"


@forward_of("norm")
def norm_forward(module, original, norm: Norm, *args, **kwargs):
    x = value_of(only_input(args, kwargs, norm.argument))
    if x is None:
        return original(module, *args, **kwargs)
    weight = None if norm.weight is None else getattr(module, norm.weight)
    bias = None if norm.bias is None else getattr(module, norm.bias)
    out = _output_dtype(norm, x, weight) if plain(x, weight, bias) else None
    if (
        out is None
        or x.dim() < (1 if norm.vectors else 2)
        or (bias is not None and (weight is None or bias.dtype != weight.dtype))
        or changed(module, norm.attributes)
    ):
        own(norm.op, "dtypes or tensors that were not measured, or attributes that have changed since")
        return original(module, x)
    if norm.narrow_inside and x.dtype in NARROW and torch.is_autocast_enabled(x.device.type):
        own(norm.op, "autocast would widen its operators")
        return original(module, x)
    eps = getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps
    shape = x.shape[-1:]
    wide = x if x.dtype == torch.promote_types(x.dtype, out) else x.to(out)
    if norm.center:
        return layer_norm(wide, shape, weight, bias, eps, weight_offset=norm.offset).to(out)
    if bias is not None:
        # rms_norm has none. Rounded once: a bias may leave little of the normed rows, and nothing of their roundings.
        wide = x.to(torch.promote_types(out, torch.float32))
        return (rms_norm(wide, shape, weight, eps, weight_offset=norm.offset) + bias).to(out)
    if norm.offset == 0.0 and eps is not None and not watched() and takes_rms(wide, weight):
        return undropped_norm(wide, None, weight, None, eps=eps, center=False)[0].to(out)
    return rms_norm(wide, shape, weight, eps, weight_offset=norm.offset).to(out)


def _output_dtype(norm: Norm, x, weight) -> torch.dtype | None:
    if weight is not None and (x.shape[-1:] != weight.shape or x.device != weight.device):
        return None
    for given, of_weight, out in norm.dtypes:
        if given == x.dtype and (weight is None or of_weight == weight.dtype):
            return out
    return None
