"""Layer norm: y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions (Ba et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import Op, define, pick, register
from ._autograd import gradients
from ._norm import check_norm, flat, kernel_refuses, norm_cost, norm_samples


def layer_norm_reference(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """The definition, in at least fp32, rounded once to the input's dtype."""
    wide = torch.promote_types(input.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(wide)
    x = x - x.mean(dims, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(input.dtype)


def _fwd_fake(x, weight, bias, eps):
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@define("layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", _fwd_fake)
def _layer_norm_fwd(x, weight, bias, eps):
    from ..kernels.layer_norm import layer_norm_fwd

    return layer_norm_fwd(x, weight, bias, eps)


def _bwd_fake(dy, x, weight, mean, rstd, bias_dtype, needs):
    n = x.shape[-1]
    dweight_dtype = weight.dtype if weight is not None else x.dtype
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(n if needs[1] else 0, dtype=dweight_dtype if needs[1] else x.dtype),
        x.new_empty(n if needs[2] else 0, dtype=bias_dtype),
    )


@define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, ScalarType bias_dtype, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _layer_norm_bwd(dy, x, weight, mean, rstd, bias_dtype, needs):
    from ..kernels.layer_norm import layer_norm_bwd

    return layer_norm_bwd(dy, x, weight, mean, rstd, bias_dtype, needs)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, eps):
        return _layer_norm_fwd(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, dy, _dmean, _drstd):
        if dy is None:
            return None, None, None, None
        x, weight, bias, mean, rstd = ctx.saved_tensors
        bias_dtype = x.dtype if bias is None else bias.dtype

        def launch(inputs, outputs_grad, extras, needs):
            return _layer_norm_bwd(*outputs_grad, *inputs[:2], *extras, bias_dtype, needs)

        def formula(x, weight, bias):
            return layer_norm_reference(x, x.shape[-1:], weight, bias, ctx.eps)

        return *gradients(launch, formula, (x, weight, bias), ctx.needs_input_grad[:3], (dy,), (mean, rstd)), None


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """``torch.nn.functional.layer_norm``, fused.

    Args:
        input: (..., *normalized_shape), floating point, any strides.
        normalized_shape: the last dimensions of ``input``, over which mean and variance are taken.
        weight, bias: normalized_shape, or None. May be fp32 beside a 16-bit input.
        eps: added to the variance.

    Returns:
        A tensor as ``input``, in its dtype. Mean and 1/std are taken in fp32 whatever the dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape or device does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    shape = check_norm("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if pick("layer_norm", input, weight, bias, refused={"triton": kernel_refuses(input, shape)}) == "eager":
        return F.layer_norm(input, shape, weight, bias, eps)
    x = input.flatten(-len(shape))
    return _LayerNorm.apply(x, flat(weight), flat(bias), eps)[0].view(input.shape)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm``, with the same arguments and state_dict keys, on :func:`layer_norm`."""

    def forward(self, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


register(
    Op(
        name="layer_norm",
        summary="mean and variance over the last dimensions, then weight and bias",
        function=layer_norm,
        reference=layer_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=True),
        cost=norm_cost,
        backends=("eager", "triton"),
        module=LayerNorm,
    )
)
