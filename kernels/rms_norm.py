"""RMS norm (Zhang and Sennrich 2019): launchers over the kernels in _norm.py."""

from ._norm import norm_bwd, norm_fwd


def rms_norm_fwd(x, weight, eps):
    """See :func:`._norm.norm_fwd`: (y, rstd)."""
    y, _, rstd = norm_fwd(x, weight, None, eps, center=False)
    return y, rstd


def rms_norm_bwd(dy, x, weight, rstd, needs):
    """See :func:`._norm.norm_bwd`: (dx, dweight)."""
    dx, dweight, _ = norm_bwd(dy, x, weight, None, rstd, False, x.dtype, (*needs, False))
    return dx, dweight
