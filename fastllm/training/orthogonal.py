"""The orthogonal factor of a matrix, nearly, by products alone: what Muon steps along."""

from __future__ import annotations

import torch

from ..cpu import matmul_dtype

# Muon's quintic iteration, its number of steps, and the least norm that is divided by (Jordan et al. 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_LEAST_NORM = 1e-7


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each ``matrix`` (..., rows, columns): its singular values become about 1.

    In bfloat16; in float32 on a CPU without products of bfloat16, for long matrices by way of their Gram matrix.
    Newton-Schulz iteration on the smaller side; K. Jordan et al., Muon: an optimizer for hidden layers (2024).

    Args:
        matrix: 2-D, or 3-D for several of one shape.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(matmul_dtype(matrix.device))
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        x = _of_gram(x @ x.mT) @ x
    else:
        a, b, c = _NEWTON_SCHULZ
        for _ in range(_STEPS):
            gram = x @ x.mT
            x = _sum(a, x, 1.0, _sum(b, gram, c, gram, gram), x)
    return x.mT if tall else x


def _of_gram(gram: torch.Tensor) -> torch.Tensor:
    """What x is multiplied with to become its orthogonal factor: a polynomial of ``gram`` = x x^T.

    All products are of the short side: 1024 x 256 takes 8.0 ms in place of 14.3, and 512 x 256 6.7 in place of 7.9, on
    one core of an AMD EPYC held to AVX2. In float32 the factor is within 4e-4 of the same iteration in float64 where
    singular values span nine decades, and within 2e-6 where they are alike. The iteration in bfloat16 is within 0.25
    and 0.014.
    """
    factor = step = _step_of_gram(gram)
    for _ in range(_STEPS - 1):
        gram = step @ gram @ step
        step = _step_of_gram(gram)
        factor = step @ factor
    return factor


def _step_of_gram(gram: torch.Tensor) -> torch.Tensor:
    """What a step of the iteration multiplies x with from the left."""
    a, b, c = _NEWTON_SCHULZ
    step = _sum(b, gram, c, gram, gram)
    step.diagonal(dim1=-2, dim2=-1).add_(a)
    return step


def _sum(beta: float, added: torch.Tensor, alpha: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """beta added + alpha left right, of one matrix or of several."""
    product = torch.addmm if left.dim() == 2 else torch.baddbmm
    return product(added, left, right, beta=beta, alpha=alpha)
