"""RMS norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..registry import Op, define, pick, register
from ._autograd import gradients
from ._norm import check_norm, flat, kernel_refuses, norm_cost, norm_samples


def _default_eps(dtype: torch.dtype) -> float:
    """torch's default: the epsilon of the dtype that the mean is taken in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def rms_norm_reference(input, normalized_shape, weight=None, eps=None):
    """The definition, in at least fp32, rounded once to the input's dtype."""
    wide = torch.promote_types(input.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(wide)
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + (_default_eps(input.dtype) if eps is None else eps))
    if weight is not None:
        y = y * weight.to(wide)
    return y.to(input.dtype)


def _fwd_fake(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@define("rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", _fwd_fake)
def _rms_norm_fwd(x, weight, eps):
    from ..kernels.rms_norm import rms_norm_fwd

    return rms_norm_fwd(x, weight, eps)


def _bwd_fake(dy, x, weight, rstd, needs):
    dweight = x.new_empty(x.shape[-1] if needs[1] else 0, dtype=weight.dtype if needs[1] else x.dtype)
    return x.new_empty(x.shape if needs[0] else 0), dweight


@define("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool[2] needs) -> (Tensor, Tensor)", _bwd_fake)
def _rms_norm_bwd(dy, x, weight, rstd, needs):
    from ..kernels.rms_norm import rms_norm_bwd

    return rms_norm_bwd(dy, x, weight, rstd, needs)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, eps):
        return _rms_norm_fwd(x, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.eps = inputs
        _, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)

    @staticmethod
    def backward(ctx, dy, _drstd):
        if dy is None:
            return None, None, None
        x, weight, rstd = ctx.saved_tensors

        def launch(inputs, outputs_grad, extras, needs):
            return _rms_norm_bwd(*outputs_grad, *inputs, *extras, needs)

        def formula(x, weight):
            return rms_norm_reference(x, x.shape[-1:], weight, ctx.eps)

        return *gradients(launch, formula, (x, weight), ctx.needs_input_grad[:2], (dy,), (rstd,)), None


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """``torch.nn.functional.rms_norm``, fused.

    Args:
        input: (..., *normalized_shape), floating point, any strides.
        normalized_shape: the last dimensions of ``input``, over which the mean square is taken.
        weight: normalized_shape, or None. May be fp32 beside a 16-bit input.
        eps: added to the mean square; None means torch's default, the epsilon of the dtype that the mean is taken
            in (fp32's for 16-bit inputs).

    Returns:
        A tensor as ``input``, in its dtype. The mean square is taken in fp32 whatever the dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape or device does not fit.
        BackendError: the backend asked for cannot serve the call.
    """
    shape = check_norm("rms_norm", input, normalized_shape, weight=weight)
    if pick("rms_norm", input, weight, refused={"triton": kernel_refuses(input, shape)}) == "eager":
        if weight is not None and weight.dtype != input.dtype:
            # torch warns on every such call that it leaves its fused path; the definition rounds once, as it does.
            return rms_norm_reference(input, shape, weight, eps)
        return F.rms_norm(input, shape, weight, eps)
    x = input.flatten(-len(shape))
    eps = _default_eps(input.dtype) if eps is None else eps
    return _RMSNorm.apply(x, flat(weight), eps)[0].view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm``, with the same arguments and state_dict keys, on :func:`rms_norm`."""

    def forward(self, x):
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


register(
    Op(
        name="rms_norm",
        summary="root mean square over the last dimensions, then weight",
        function=rms_norm,
        reference=rms_norm_reference,
        samples=lambda device, dtype: norm_samples(device, dtype, bias=False),
        cost=norm_cost,
        backends=("eager", "triton"),
        module=RMSNorm,
    )
)
