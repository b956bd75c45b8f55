"""The products of a linear layer with a chunk of its rows: logits, and the gradients of rows and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import extension
from ..shared import onednn
from ..shared.widened import widened_input_grad, widened_linear, widens

# Columns of ``a`` that are widened at once where products of 16-bit operands are taken in fp32. A guess.
WIDENED_COLUMNS = 2048


class Layer(NamedTuple):
    """A linear layer and the rows (N, D) that it is applied to: what gets a gradient."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def logits_into(x, weight, bias, out):
    """``out`` (rows, V) = x @ weight.T + bias, of one dtype."""
    if widens(x):
        return widened_linear(x, weight, bias, out)
    if onednn.onednn_serves_rows(x, weight):
        return onednn.onednn_linear(x, weight, bias, out)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def gradients_are_torchs(layer: Layer) -> bool:
    """Whether a layer without bias has PyTorch's own products for its gradients, in the layer's dtype."""
    x, weight, bias = layer
    return bias is None and not widens(x) and not onednn.onednn_serves(x, weight)


def rows_gradient_into(dz, weight, out):
    """``out`` (rows, D) = dz @ weight, of one dtype."""
    if onednn.onednn_serves(out, weight):
        return out.copy_(onednn.onednn_input_grad(dz, weight))
    return widened_input_grad(dz, weight, out) if widens(dz) else torch.mm(dz, weight, out=out)


def _product_fake(total, a, b, first):
    return None


_add_bf16_product = extension.operator("add_product_", _product_fake)


def _adds_bf16(total, a, b) -> bool:
    """Whether the extension adds this product: in bfloat16, to a total in fp32, on a CPU that it multiplies on.

    PyTorch's products may be capped below the extension's: then a total of 16 bits comes here, which it does not take.
    """
    dtypes = total.dtype, a.dtype, b.dtype
    return dtypes == (torch.float32, torch.bfloat16, torch.bfloat16) and extension.bf16_products() != "none"


def add_product(total, a, b, backend: str, first: bool) -> None:
    """``total += a.T @ b``, summed in at least fp32. A total of 16 bits is the product alone, rounded once."""
    wide = torch.promote_types(total.dtype, torch.float32)
    narrow = a.dtype == b.dtype != wide
    if narrow and total.dtype == a.dtype and not widens(a):
        # Hardware that multiplies 16 bits sums them in fp32.
        torch.mm(a.t(), b, out=total)
    elif total.dtype == a.dtype and onednn.onednn_serves(b, total):
        onednn.onednn_add_weight_grad(total, a, b, first)
    elif total.dtype == a.dtype == b.dtype == wide:
        torch.addmm(total, a.t(), b, beta=0 if first else 1, out=total)
    elif backend == "native" and _adds_bf16(total, a, b):
        _add_bf16_product(total, a, b if b.stride(1) == 1 else b.contiguous(), first)
    elif narrow and a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        # PyTorch's CPU matmuls sum 16-bit operands into 16 bits, which would cost dW its precision over many chunks.
        b = b.to(wide)
        for some, columns in zip(total.split(WIDENED_COLUMNS), a.split(WIDENED_COLUMNS, 1), strict=True):
            columns = columns.to(wide).t()
            if some.dtype == wide:
                torch.addmm(some, columns, b, beta=0 if first else 1, out=some)
            else:
                some.copy_(columns @ b)


@dataclass
class LayerGradients:
    """The gradients of a layer, added up over chunks of its rows; None for one that is not needed.

    ``x`` in its own dtype. ``bias`` in at least fp32. ``weight`` too, but in its own dtype where one chunk is all: the
    sum in fp32 need not be kept then.
    """

    layer: Layer
    backend: str
    x: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    begun: bool = False

    @classmethod
    def of(cls, layer: Layer, needs, backend: str, chunks: int, every: bool) -> LayerGradients:
        """Of no rows yet. ``needs``: which are wanted, in the order of ``layer``. ``chunks``: how many will come.

        ``every``: each row will, in a slice.
        """
        x, weight, _ = layer
        wide = torch.promote_types(x.dtype, torch.float32)
        dtype = weight.dtype if chunks == 1 else wide
        blank = torch.empty if chunks else torch.zeros  # the first chunk overwrites it
        like = torch.empty_like if every else torch.zeros_like
        need_dx, need_dw, need_db = needs
        return cls(
            layer, backend,
            like(x, memory_format=torch.contiguous_format) if need_dx else None,
            blank(weight.shape, dtype=dtype, device=x.device) if need_dw else None,
            torch.zeros(len(weight), dtype=wide, device=x.device) if need_db else None,
        )  # fmt: skip

    def add(self, at, rows, dlogits, narrow) -> None:
        """Those of the rows ``x[at] = rows`` for ``dlogits``; ``narrow``: of its shape in x's dtype, overwritten."""
        if self.weight is not None:
            add_product(self.weight, dlogits, rows, self.backend, first=not self.begun)
            self.begun = True
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.x is None:
            return
        if dlogits.dtype != narrow.dtype:
            narrow.copy_(dlogits)
        if isinstance(at, slice):
            rows_gradient_into(narrow, self.layer.weight, self.x[at])
        else:
            self.x.index_copy_(0, at, rows_gradient_into(narrow, self.layer.weight, torch.empty_like(rows)))
