"""Products of float32 matrices by oneDNN, where it multiplies faster than the library that PyTorch takes (MKL).

MKL does not use AVX-512 on AMD's CPUs. GFLOP/s of one thread of an AMD EPYC of family 26, M rows, K features and N
classes, by MKL and by oneDNN in one sum:

======================  =================  =================  =================
held to                 outputs            rows' gradient     weight's gradient
======================  =================  =================  =================
AVX-512, 4096 384 1536  107, 242           104, 242           105, 192
AVX-512, 2048 1024 256  102, 228           101, 227           103, 197
AVX-512, 2048 2048 2048 102, 218           103, 214           104, 198
AVX2, 4096 384 1536     106, 120           104, 122           105, 105
AVX2, 2048 1024 256     104, 120           104, 124           106, 109
AVX2, 2048 2048 2048    111, 123           112, 120           111, 113
======================  =================  =================  =================

At AVX2 the linear losses take their logits from it, and functional.linear nothing: in parts of sums, which its errors
need, it is 2 to 7% faster there, and at AVX-512 1.6 to 1.8 times as fast. The bits did not depend on the number of
threads, 1 or 2, for any product of seven shapes at both levels.
"""

from __future__ import annotations

import functools
import math

import torch

from ... import cpu

# Classes of a large weight that are multiplied at once: oneDNN lays a weight out anew, in memory of its own.
CLASSES = 1024
# Elements of a weight up to which it is multiplied whole, 16 MiB. 128 x 768 x 4096 takes 0.78 of MKL's time at AVX2 so
# and 0.87 in blocks, which are copied together.
WHOLE = 2**22
# Multiplications below which PyTorch's product is kept: oneDNN compiles and looks up code for each shape. A guess.
FEWEST = {"avx2": 2**24, "avx512": 2**24, "amx": 2**24}
# Levels at which oneDNN is faster for the gradients too.
_ALL = ("avx512", "amx")


@functools.cache
def _is_measured() -> bool:
    """Whether this CPU is like those on which oneDNN was measured to be the faster one."""
    if cpu.maker() != "AuthenticAMD" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def _fewest() -> float:
    """:data:`FEWEST` of this CPU's level; infinity where oneDNN was not measured to be the faster one."""
    return FEWEST.get(cpu.level(), math.inf) if _is_measured() else math.inf


def _faster_for_all() -> bool:
    return cpu.level() in _ALL


# A compiler takes the answers instead of reading /proc/cpuinfo. It does not look for this mark on a cached function.
for _answer in (_fewest, _faster_for_all):
    _answer._dynamo_marked_constant = True


def onednn_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products of ``rows`` (..., K) with a ``weight`` (N, K), and of both gradients, are oneDNN's."""
    return onednn_serves_rows(rows, weight) and _faster_for_all()


def onednn_serves_rows(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product ``rows @ weight.T`` is, whatever serves the gradients."""
    if weight.dtype is not torch.float32 or rows.dtype is not torch.float32 or not (weight.is_cpu and rows.is_cpu):
        return False
    fewest = _fewest()
    enough = fewest < math.inf and rows.numel() * weight.shape[0] >= fewest
    return enough and bool(torch.backends.mkldnn.enabled)  # this last: it takes 1 us, and a small product 16


def onednn_may_serve(weight: torch.Tensor) -> bool:
    """Whether :func:`onednn_serves` products with ``weight`` (N, K) if only there are enough rows."""
    return is_float_of_amd(weight) and _faster_for_all()


def is_float_of_amd(weight: torch.Tensor) -> bool:
    """Whether ``weight`` is in float32 on a CPU on which PyTorch's library was measured to be the slower one."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and _fewest() < math.inf


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, copied where oneDNN would copy it element by element: 70 ms for 70 x 48."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,), where :func:`onednn_serves_rows`."""
    return torch.ops.mkldnn._linear_pointwise(x, _laid_out(weight), bias, "none", [], "")


def parts_of_sum(length: int) -> list[slice]:
    """Equal parts of a sum of ``length`` products, each so short that its error is like MKL's.

    oneDNN adds one product after the other, so the error of n terms of a sum of N grows as n / sqrt(N). With at most
    256 terms and 9 sqrt(N) the largest error of 512 x 768 x 3072 is 2.4e-6, MKL's 2.0e-6, and 4.8e-6 in one sum.
    """
    count = max(1, math.ceil(length / min(256.0, 9.0 * math.sqrt(max(length, 1)))))
    size = math.ceil(length / count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,), a fresh tensor, summed in :func:`parts_of_sum` of K."""
    first, *others = parts_of_sum(x.shape[1])
    total = multiplied(x[:, first], weight[:, first], bias)
    for some in others:
        part = x[:, some], total, _laid_out(weight[:, some])
        total = torch.ops.mkldnn._linear_pointwise.binary(*part, None, "add")
    return total


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``out`` (M, N) = x (M, K) @ weight (N, K).T + bias (N,)."""
    for first in range(0, len(weight), CLASSES):
        some = slice(first, first + CLASSES)
        out[:, some] = multiplied(x, weight[some], None if bias is None else bias[some])
    return out


def onednn_outputs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K) @ weight (N, K).T + bias (N,), a fresh tensor."""
    if weight.numel() <= WHOLE:
        return multiplied(x, weight, bias)
    return onednn_linear(x, weight, bias, x.new_empty(len(x), len(weight)))


def onednn_input_grad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy (M, N) @ weight (N, K), a fresh tensor."""
    total = multiplied(dy[:, :CLASSES], weight[:CLASSES].t())
    for first in range(CLASSES, len(weight), CLASSES):
        some = slice(first, first + CLASSES)
        total += multiplied(dy[:, some], weight[some].t())
    return total


def onednn_add_weight_grad(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    """``total`` (N, K) += dy (M, N).T @ x (M, K). ``first``: these rows' product is ``total`` itself."""
    across = x.t()
    for start in range(0, len(total), CLASSES):
        some = slice(start, start + CLASSES)
        # Turned by PyTorch first: 320 x 512 x 8192 at AVX-512 runs at 164 instead of 157 GFLOP/s then.
        part = multiplied(dy[:, some].t().contiguous(), across)
        total[some].copy_(part) if first else total[some].add_(part)
