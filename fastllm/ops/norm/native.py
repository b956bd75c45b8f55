"""The norms on a CPU by the extension (csrc/cpu/norm.cpp): a row is read, normed and written while the cache holds it.

The functions are those of kernels/norm/forward.py and backward.py, with their arguments; fp64 is taken too.
"""

from __future__ import annotations

import torch

from ... import extension


def _wide(x, residual) -> torch.dtype:
    """What rows are computed in: fp32, or fp64 where one of them is."""
    return (
        torch.float64 if torch.float64 in (x.dtype, x.dtype if residual is None else residual.dtype) else torch.float32
    )


def _rows_fake(x, residual, weight, bias, seed, eps, p, center):
    wide, rows = _wide(x, residual), x.shape[:-1].numel()
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(x.shape),
        x.new_empty(rows if center else 0, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _grad_fake(dy, dh, x, weight, seed, mean, rstd, input_dtype, p, center, *needs):
    n = x.shape[-1]
    return (
        x.new_empty(x.shape if needs[0] else 0, dtype=input_dtype),
        x.new_empty(x.shape if needs[1] else 0),
        *(rstd.new_empty(n if need else 0) for need in needs[2:]),
    )


_rows = extension.operator("norm_rows", _rows_fake)
_grad_rows = extension.operator("norm_grad_rows", _grad_fake)


def _weight(weight, offset: float, wide):
    if weight is None:
        return None
    weight = weight.to(wide)
    return (weight if offset == 0.0 else weight + offset).contiguous()


def norm_fwd(x, residual, weight, bias, seed, eps: float, offset: float, p: float, center: bool):
    wide = _wide(x, residual)
    bias = None if bias is None else bias.to(wide).contiguous()
    return _rows(x, residual, _weight(weight, offset, wide), bias, seed, eps, p, center)


def norm_bwd(dy, dh, x, weight, seed, mean, rstd, input_dtype, bias_dtype, offset, p, center, needs):
    need_dinput, need_dresidual, need_dweight, need_dbias = needs
    if p == 0.0 and input_dtype == x.dtype:
        need_dinput, need_dresidual = need_dinput or need_dresidual, False
    dinput, dresidual, dweight, dbias = _grad_rows(
        dy, dh, x, _weight(weight, offset, rstd.dtype), seed, mean, rstd, input_dtype, p, center,
        need_dinput, need_dresidual, need_dweight, need_dbias,
    )  # fmt: skip
    return dinput, dresidual, dweight.to(weight.dtype if need_dweight else x.dtype), dbias.to(bias_dtype)
