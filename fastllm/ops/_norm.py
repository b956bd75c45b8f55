"""What layer_norm and rms_norm share: checks, samples, least bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..registry import Cost, Sample


def check_norm(op: str, input, normalized_shape, **parameters) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, once ``input`` and the parameters are found to fit it."""
    if not isinstance(input, torch.Tensor) or not input.is_floating_point():
        got = str(input.dtype) if isinstance(input, torch.Tensor) else type(input).__name__
        raise TypeError(f"{op}: input must be a floating-point tensor, got {got}")
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{op}: normalized_shape must name at least one dimension, got ()")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: input must end in normalized_shape {list(shape)}, got input of shape {list(input.shape)}"
        )
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{op}: {name} must have normalized_shape {list(shape)}, got shape {list(parameter.shape)}"
            )
        if parameter.device != input.device:
            raise ValueError(f"{op}: {name} is on {parameter.device}, input on {input.device}; they must be together")
    return shape


def kernel_refuses(input: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a norm kernel cannot take these arguments, or None."""
    if 0 in shape:
        return f"normalized_shape {list(shape)} has no elements"
    return None


def flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A norm's weight or bias as the kernels take it: (N,), contiguous."""
    return None if parameter is None else parameter.reshape(-1).contiguous()


def norm_samples(device, dtype, *, bias: bool):
    """Shapes and layouts that have broken norms elsewhere; floating leaves require grad."""

    def make(*shape, scale=1.0, offset=0.0):
        values = torch.randn(shape, device=device, dtype=torch.float32) * scale + offset
        return values.to(dtype).requires_grad_()

    def sample(name, x, shape: Sequence[int], weight=True, use_bias=bias, **kwargs):
        if weight:
            kwargs["weight"] = make(*shape, scale=0.3, offset=1.0)
        if use_bias:
            kwargs["bias"] = make(*shape)
        return Sample(name, (x, tuple(shape)), kwargs)

    for rows, cols in ((1, 1), (3, 1), (5, 63), (2, 100), (37, 127), (300, 8), (2, 1000), (1, 20001)):
        yield sample(f"{rows}x{cols}", make(rows, cols), (cols,))
    yield sample("no_rows", make(0, 16), (16,))
    yield sample("vector", make(33), (33,))
    yield sample("no_parameters", make(2, 3, 24), (24,), weight=False, use_bias=False)
    yield sample("two_dims", make(4, 3, 5, 6), (5, 6))
    yield sample("large_mean", make(4, 96, scale=0.5, offset=8.0), (96,))
    yield sample("transposed", make(40, 6).transpose(0, 1), (40,))
    yield sample("row_stride", make(6, 64)[:, 5:38], (33,))
    yield sample("expanded", make(1, 48).expand(5, 48), (48,))
    yield sample("eps", make(4, 32, scale=1e-3), (32,), eps=1e-2)
    if bias:
        yield sample("bias_only", make(3, 20), (20,), weight=False)
        yield sample("weight_only", make(3, 20), (20,), use_bias=False)


def norm_cost(input, normalized_shape, weight=None, bias=None, eps=None) -> Cost:
    """x in, y out; backward: x and dy in, dx out; each parameter once."""
    data = input.numel() * input.element_size()
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    return Cost(2 * data + parameters, 3 * data + 2 * parameters)
