"""Shapes and rivals of rms_norm."""

import torch

from ._norm import norm_shapes

shapes = norm_shapes(bias=False)


def _eps(input, eps):
    return torch.finfo(input.dtype).eps if eps is None else eps


def _liger():
    from liger_kernel.transformers.functional import liger_rms_norm

    def rms_norm(input, normalized_shape, weight, eps=None):
        # In place, its backward overwrites the incoming gradient.
        return liger_rms_norm(input, weight, _eps(input, eps), in_place=False)

    return rms_norm


def _quack():
    from quack.rmsnorm import rmsnorm

    def rms_norm(input, normalized_shape, weight, eps=None):
        return rmsnorm(input, weight, eps=_eps(input, eps))

    return rms_norm


rivals = {"liger-kernel": _liger, "quack": _quack}
