"""The orthogonal factor of a matrix, nearly, by products alone: what Muon steps along."""

from __future__ import annotations

import torch

from ..cpu import matmul_dtype

# Muon's quintic iteration, its number of steps, and the least norm that is divided by (Jordan et al. 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_LEAST_NORM = 1e-7


def _of_gram(gram: torch.Tensor) -> torch.Tensor:
    """What x is multiplied with to become its orthogonal factor: a polynomial of ``gram`` = x x^T.

    All products are of the short side: 1024 x 256 takes 8.0 ms in place of 14.3, and 512 x 256 6.7 in place of 7.9, on
    one core of an AMD EPYC held to AVX2. In float32 the factor is within 4e-4 of the same iteration in float64 where
    singular values span nine decades, and within 2e-6 where they are alike. The iteration in bfloat16 is within 0.25
    and 0.014.
    """
    factor = step = _step_of_gram(gram)
    for _ in range(_NEWTON_SCHULZ_STEPS - 1):
        gram = step @ gram @ step
        step = _step_of_gram(gram)
        factor = step @ factor
    return factor


def _step_of_gram(gram: torch.Tensor) -> torch.Tensor:
    """What a step of the iteration multiplies x with from the left."""
    a, b, c = _NEWTON_SCHULZ
    step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    step.diagonal().add_(a)
    return step


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of ``matrix`` (rows, columns): its singular values become about 1.

    In bfloat16; in float32 on a CPU without products of bfloat16, for long matrices by way of their Gram matrix.
    Newton-Schulz iteration on the smaller side; K. Jordan et al., Muon: an optimizer for hidden layers (2024).
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(matmul_dtype(matrix.device))
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_LEAST_NORM)
    if x.dtype == torch.float32 and x.shape[1] >= 2 * len(x):
        x = _of_gram(x @ x.T) @ x
    else:
        for _ in range(_NEWTON_SCHULZ_STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
