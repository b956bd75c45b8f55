"""Calls of the norms for tests, the bench and ``fastllm info``, and the least bytes that they must move."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...registry import Cost, Sample


def _norm_tensor(device, *shape, dtype, scale=1.0, offset=0.0) -> torch.Tensor:
    values = torch.randn(shape, device=device, dtype=torch.float32) * scale + offset
    return values.to(dtype).requires_grad_()


def norm_samples(device: torch.device, dtype: torch.dtype, *, bias: bool, residual: bool = False) -> Iterator[Sample]:
    """Shapes and layouts that have broken norms elsewhere; floating leaves require grad."""
    make = partial(_norm_tensor, device, dtype=dtype)

    def sample(name, x, shape, *, weight=True, use_bias=bias, other=None, **kwargs):
        if weight:
            kwargs["weight"] = make(*shape, scale=0.3, offset=1.0)
        if use_bias:
            kwargs["bias"] = make(*shape)
        args = (x, other if other is not None else make(*x.shape)) if residual else (x,)
        return Sample(name, (*args, tuple(shape)), kwargs)

    # With one column 1/std is 1/sqrt(eps). At the usual eps that factor makes eager PyTorch's rounding errors visible.
    yield sample("3x1", make(3, 1), (1,), eps=1e-2)
    for rows, cols in ((1, 9), (5, 63), (2, 100), (37, 127), (300, 8), (2, 1000), (1, 8200)):
        yield sample(f"{rows}x{cols}", make(rows, cols), (cols,))
    yield sample("no_rows", make(0, 16), (16,))
    yield sample("vector", make(33), (33,))
    yield sample("no_parameters", make(2, 3, 24), (24,), weight=False, use_bias=False)
    yield sample("two_dims", make(4, 3, 5, 6), (5, 6))
    yield sample("large_mean", make(4, 96, scale=0.5, offset=8.0), (96,))
    yield sample("transposed", make(40, 6).transpose(0, 1), (40,))
    yield sample("row_stride", make(6, 64)[:, 5:38], (33,))
    yield sample("packed_heads", make(5, 3, 4, 16)[:, 1], (16,))
    yield sample("expanded", make(1, 48).expand(5, 48), (48,))
    yield sample("eps", make(4, 32, scale=1e-3), (32,), eps=1e-2)
    yield sample("weight_offset", make(4, 40), (40,), weight_offset=1.0)
    if bias:
        yield sample("bias_only", make(3, 20), (20,), weight=False)
        yield sample("weight_only", make(3, 20), (20,), use_bias=False)
    if residual:
        yield sample("wide_residual", make(7, 36), (36,), other=make(7, 36, dtype=torch.float32))
        yield sample("strided_residual", make(6, 36), (36,), other=make(6, 3, 50)[:, 2, 7:43])


def _example(name: str, device: torch.device, dtype, residual=None, **options) -> Sample:
    x, *others = (torch.zeros(2, 64, device=device, dtype=d) for d in (dtype, residual) if d is not None)
    options["weight"] = torch.ones(64, device=device, dtype=dtype)
    return Sample(name, (x, *others, (64,)), options)


def layer_norm_examples(device: torch.device) -> Iterator[Sample]:
    """The calls that ``fastllm info`` tells apart: on a CPU some of them are PyTorch's own."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _example(str(dtype).removeprefix("torch."), device, dtype)


def add_layer_norm_examples(device: torch.device) -> Iterator[Sample]:
    """The same beside a residual, and with dropout."""
    yield _example("float32", device, torch.float32, torch.float32)
    yield _example("float32 with dropout", device, torch.float32, torch.float32, dropout_p=0.1)
    yield _example("bfloat16", device, torch.bfloat16, torch.bfloat16)
    yield _example("bfloat16 beside a float32 residual", device, torch.bfloat16, torch.float32)
    yield _example("float16", device, torch.float16, torch.float16)


def norm_cost(input, normalized_shape, weight=None, bias=None, eps=None, *, weight_offset=0.0) -> Cost:
    """x in, y out; backward: x and dy in, dx out; each parameter once."""
    data = input.numel() * input.element_size()
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    return Cost(2 * data + parameters, 3 * data + 2 * parameters)


def add_norm_cost(input, residual, normalized_shape, weight=None, bias=None, eps=None, **options) -> Cost:
    """Both in, both out; backward: h and the gradients of both outputs in, the inputs' out, once if in one dtype."""
    narrow = input.numel() * input.element_size()
    wide = residual.numel() * residual.element_size()
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    separate = narrow if options.get("dropout_p") or input.dtype != residual.dtype else 0
    return Cost(2 * (narrow + wide) + parameters, narrow + 3 * wide + separate + 2 * parameters)
