"""The norms on a CPU by the extension (csrc/cpu/norm.cpp): a row is read, normed and written while the cache holds it.

:func:`norm_rows` and :func:`norm_grad_rows` take and return what the launchers in kernels/norm do. fp64 is taken too.
"""

from __future__ import annotations

import torch

from ... import extension
from ...backends import KERNEL_DTYPES, chosen_backend, operators_alone
from .call import NormBackward, NormForward, WantedGradients


def _wide(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """What rows are computed in: fp32, or fp64 where one of them is."""
    narrow = x.dtype != torch.float64 and (residual is None or residual.dtype != torch.float64)
    return torch.float32 if narrow else torch.float64


def _norm_rows_fake(*args):
    x, residual, *_, center = args
    # Not by x.shape[:-1].numel(), which makes a graph of each size.
    wide, rows = _wide(x, residual), x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else residual.new_empty(x.shape),
        x.new_empty(rows if center else 0, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _norm_grad_rows_fake(*args):
    _, _, x, _, _, _, _, input_dtype, weight_dtype, bias_dtype, _, _, *needs = args
    wanted, n_cols = WantedGradients(*needs), x.shape[-1]
    return (
        x.new_empty(x.shape if wanted.input else 0, dtype=input_dtype),
        x.new_empty(x.shape if wanted.residual else 0),
        x.new_empty(n_cols if wanted.weight else 0, dtype=weight_dtype),
        x.new_empty(n_cols if wanted.bias else 0, dtype=bias_dtype),
    )


# (x, residual, weight, bias, seed, eps, dropout_p, center) -> (y, h, mean, rstd); weight and bias contiguous, and no
# wider than the accumulator. (dy, dh, normed, weight, seed, mean, rstd, dtypes of the gradients of input, weight and
# bias, dropout_p, center, whether to compute those of input, residual, weight and bias) -> (dinput, dresidual, dweight,
# dbias).
_norm_of_rows = extension.operator("norm_rows", _norm_rows_fake)
_grad_of_rows = extension.operator("norm_grad_rows", _norm_grad_rows_fake)
# (x, weight, bias, eps, center) -> y, of rows without residual and dropout.
extension.operator("normed_rows", lambda x, *others: x.new_empty(x.shape))


def _fitting(parameter: torch.Tensor | None, offset: float, wide: torch.dtype) -> torch.Tensor | None:
    """parameter + offset, contiguous, and no wider than the accumulator's dtype ``wide``."""
    if parameter is None:
        return None
    if offset != 0.0:
        parameter = parameter.to(wide) + offset
    elif parameter.dtype == torch.float64 != wide:
        parameter = parameter.to(wide)
    return parameter if parameter.is_contiguous() else parameter.contiguous()


def takes_rms(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether :func:`undropped_norm` with ``center=False`` is RMS norm of ordinary tensors as chosen.

    For callers who know that shapes and devices fit and need no gradient: the choices of the public function take 9 us.
    """
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and x.dtype in KERNEL_DTYPES
        and (weight is None or (weight.dtype in KERNEL_DTYPES and weight.is_contiguous()))
        and chosen_backend() == "auto"
        and extension.missing() is None
        and x.shape[-1] > 0
        and not operators_alone()
    )


def norm_rows(call: NormForward):
    """(y, h, mean, rstd), as kernels/norm/forward.py's launcher returns them."""
    wide = _wide(call.x, call.residual)
    weight, bias = _fitting(call.weight, call.offset, wide), _fitting(call.bias, 0.0, wide)
    return _norm_of_rows(call.x, call.residual, weight, bias, call.seed, call.eps, call.dropout_p, call.center)


def undropped_norm(x, residual, weight, bias, eps: float, center: bool):
    """(y, h, mean, rstd) of ``x`` + ``residual`` with nothing dropped and nothing added to the weight.

    ``weight`` and ``bias`` are contiguous, and no wider than what rows are computed in. Either may be None, and so may
    ``residual``: then h is empty.
    """
    return _norm_of_rows(x, residual, weight, bias, None, eps, 0.0, center)


def norm_grad_rows(call: NormBackward):
    """(dinput, dresidual, dweight, dbias), as kernels/norm/backward.py's launcher returns them."""
    weight = _fitting(call.weight, call.offset, call.rstd.dtype)
    wanted = call.wanted()
    return _grad_of_rows(
        call.dy, call.dh, call.x, weight, call.seed, call.mean, call.rstd, call.input_dtype,
        call.weight_grad_dtype(), call.bias_dtype, call.dropout_p, call.center, *wanted,
    )  # fmt: skip


def undropped_norm_grad(grads, rows, weight, statistics, center: bool, wanted: WantedGradients):
    """(dinput, dresidual, dweight, dbias) of :func:`undropped_norm` for ``grads`` (dy, dh), where all have one dtype.

    ``rows`` are what was normed, and ``statistics`` the (mean, rstd) that came of them.
    """
    dtype = rows.dtype
    return _grad_of_rows(*grads, rows, weight, None, *statistics, dtype, dtype, dtype, 0.0, center, *wanted)
