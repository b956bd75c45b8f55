"""The products of a linear layer with a chunk of its rows: logits, and the gradients of rows and weight."""

from __future__ import annotations

import torch

from ... import extension
from ...cpu import multiplies

# Columns of ``a``, or classes, that are widened at once where products of 16-bit operands are taken in fp32.
WIDENED = 2048


def _multiplies(x: torch.Tensor) -> bool:
    """Whether the device has products of ``x``'s dtype; else they are taken in fp32, WIDENED classes at a time.

    At 1024 x 256 x 4096, forward and backward, that is 0.25 of their time in bf16 and 0.3 in fp16 (two cores, AVX2).
    """
    return x.device.type != "cpu" or multiplies(x.dtype)


def logits_into(x, weight, bias, out):
    """``out`` (rows, V) = x @ weight.T + bias, of one dtype."""
    if _multiplies(x):
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    x = x.float()
    for start in range(0, len(weight), WIDENED):
        at = slice(start, start + WIDENED)
        part = torch.mm(x, weight[at].float().t())
        out[:, at] = part if bias is None else part.add_(bias[at])
    return out


def rows_gradient_into(dz, weight, out):
    """``out`` (rows, D) = dz @ weight, of one dtype."""
    if _multiplies(dz):
        return torch.mm(dz, weight, out=out)
    total = torch.zeros(out.shape, dtype=torch.float32)
    for start in range(0, len(weight), WIDENED):
        at = slice(start, start + WIDENED)
        total.addmm_(dz[:, at].float(), weight[at].float())
    return out.copy_(total)


def _product_fake(total, a, b):
    return None


_add_bf16_product = extension.operator("add_product_", _product_fake)


def add_product(total, a, b, backend: str, first: bool) -> None:
    """``total += a.T @ b``, summed in total's dtype."""
    narrow = a.dtype == b.dtype != total.dtype
    if backend == "native" and narrow and a.dtype == torch.bfloat16 and extension.bf16_products() != "none":
        if first:
            total.zero_()
        _add_bf16_product(total, a, b if b.stride(1) == 1 else b.contiguous())
    elif narrow and a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        # PyTorch's CPU matmuls sum 16-bit operands into 16 bits, which would cost dW its precision over many chunks.
        b = b.to(total.dtype)
        step = max(1, a.shape[1] if a.dtype == total.dtype else WIDENED)
        for some, columns in zip(total.split(step), a.split(step, 1), strict=True):
            torch.addmm(some, columns.to(total.dtype).t(), b, beta=0 if first else 1, out=some)
