"""Products of float32 matrices by oneDNN, where it multiplies faster than the library that PyTorch takes (MKL).

MKL does not use AVX-512 on AMD's CPUs. One thread of an AMD EPYC of family 26 multiplied 320 rows of 512 features and
8192 classes at 99 GFLOP/s by MKL and at 188 by oneDNN in blocks of 1024 classes; the products of the gradients at 104
and 107 against 164. Held to AVX2 both do 95 to 107 there, so MKL's product is kept, which needs no blocks.
"""

from __future__ import annotations

import functools

import torch

from ... import cpu

# Classes that are multiplied at once: 1024 measured as above; 2048 and more gained nothing.
CLASSES = 1024
# Multiplications below which PyTorch's product is kept: oneDNN compiles and looks up code for each shape. A guess.
FEWEST = 2**24


@functools.cache
def _product():
    """oneDNN's ``x @ weight.T`` as PyTorch exposes it to its compiler, or None where it is not the faster one."""
    if cpu.maker() != "AuthenticAMD" or cpu.level() not in ("avx512", "amx"):
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def onednn_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products of ``rows`` (N, D) with a ``weight`` (V, D), and of its gradients, are oneDNN's."""
    both_wide = rows.dtype == weight.dtype == torch.float32
    large = rows.device.type == "cpu" and rows.shape[0] * weight.numel() >= FEWEST
    return both_wide and large and torch.backends.mkldnn.enabled and _product() is not None


def multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T, where :func:`onednn_serves`."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN copies other layouts element by element: 70 ms for 70 x 48
    product = _product()
    assert product is not None, "onednn_serves has said so"
    return product(x, weight, None, "none", [], "")


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``out`` (M, V) = x (M, D) @ weight (V, D).T + bias (V,)."""
    for first in range(0, len(weight), CLASSES):
        some = slice(first, first + CLASSES)
        part = multiplied(x, weight[some])
        if bias is None:
            out[:, some] = part
        else:
            torch.add(part, bias[some], out=out[:, some])
    return out


def onednn_input_grad(dz: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (M, D) = dz (M, V) @ weight (V, D)."""
    for first in range(0, len(weight), CLASSES):
        some = slice(first, first + CLASSES)
        part = multiplied(dz[:, some], weight[some].t())
        out.add_(part) if first else out.copy_(part)
    return out


def onednn_add_weight_grad(total: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, first_rows: bool) -> None:
    """``total`` (V, D) += dz (M, V).T @ x (M, D); the first rows' product is ``total`` itself."""
    across = x.t()
    for first in range(0, len(total), CLASSES):
        some = slice(first, first + CLASSES)
        # Turned by PyTorch first: oneDNN would take 164 instead of 157 GFLOP/s otherwise.
        part = multiplied(dz[:, some].t().contiguous(), across)
        total[some].copy_(part) if first_rows else total[some].add_(part)
