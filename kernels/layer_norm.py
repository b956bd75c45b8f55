"""Layer norm (Ba et al. 2016): launchers over the kernels in _norm.py."""

from ._norm import norm_bwd, norm_fwd


def layer_norm_fwd(x, weight, bias, eps):
    """See :func:`._norm.norm_fwd`: (y, mean, rstd)."""
    return norm_fwd(x, weight, bias, eps, center=True)


def layer_norm_bwd(dy, x, weight, mean, rstd, bias_dtype, needs):
    """See :func:`._norm.norm_bwd`: (dx, dweight, dbias)."""
    return norm_bwd(dy, x, weight, mean, rstd, True, bias_dtype, needs)
