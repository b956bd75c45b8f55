"""Products of float32 matrices by oneDNN, where it multiplies faster than the library that PyTorch takes (MKL).

MKL does not use AVX-512 on AMD's CPUs. One thread of an AMD EPYC of family 26 multiplied 320 rows of 512 features and
8192 classes at 99 GFLOP/s by MKL and at 188 by oneDNN in blocks of 1024 classes; the products of the gradients at 104
and 107 against 164. Held to AVX2, MKL's products of the gradients are as fast or faster, and oneDNN takes 0.81 to 0.95
of MKL's time for the outputs: 0.87 for 128 rows of 768 features and 4096 classes, 0.90 for 2048, 0.95 for 333 x 512 x
16384 (medians of turns).
"""

from __future__ import annotations

import functools

import torch

from ... import cpu

# Classes that are multiplied at once: 1024 measured as above; 2048 and more gained nothing.
CLASSES = 1024
# Multiplications below which PyTorch's product is kept: oneDNN compiles and looks up code for each shape. A guess.
FEWEST = 2**24


# A weight of so many elements, 16 MiB, is multiplied whole where that saves a copy: oneDNN lays it out anew, in memory
# of its own. 128 x 768 x 4096 takes 0.78 instead of 0.87 of MKL's time at AVX2.
WHOLE = 2**22
# Levels at which oneDNN is faster for the outputs and for the gradients, and for the outputs alone.
_ALL, _OUTPUTS = ("avx512", "amx"), ("avx2", "avx512", "amx")


@functools.cache
def _product(levels: tuple[str, ...] = _ALL):
    """oneDNN's ``x @ weight.T`` as PyTorch exposes it to its compiler, or None where it is not the faster one."""
    if cpu.maker() != "AuthenticAMD" or cpu.level() not in levels:
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def onednn_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products of ``rows`` (N, D) with a ``weight`` (V, D), and of its gradients, are oneDNN's."""
    return _takes(rows, weight) and _product() is not None


def onednn_serves_outputs(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product ``rows @ weight.T`` is, whatever serves the gradients."""
    return _takes(rows, weight) and _product(_OUTPUTS) is not None


def _takes(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    both_wide = rows.dtype == weight.dtype == torch.float32
    large = rows.device.type == "cpu" and rows.shape[0] * weight.numel() >= FEWEST
    return both_wide and large and bool(torch.backends.mkldnn.enabled)


def multiplied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T, where :func:`onednn_serves_outputs`."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN copies other layouts element by element: 70 ms for 70 x 48
    product = _product(_OUTPUTS)
    assert product is not None, "onednn_serves_outputs has said so"
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


def onednn_outputs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, D) @ weight (V, D).T, a fresh tensor."""
    if weight.numel() <= WHOLE:
        return multiplied(x, weight)
    return onednn_linear(x, weight, None, x.new_empty(len(x), len(weight)))


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
