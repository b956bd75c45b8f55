"""linear_cross_entropy's registered operators and their gradient."""

from __future__ import annotations

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable
from .chunks import Rows, Upstream, in_chunks
from .linear_reference import linear_cross_entropy_reference, reduced
from .loss import out_of_range

_TENSORS = "Tensor x, Tensor w, Tensor? bias, Tensor target, Tensor? weight, Tensor? token_weight"
_OPTIONS = "int ignore_index, float smoothing, float? softcap, float scale, float z_loss, str reduction"
_HOW = "int chunk, str backend, int compact, bool[3] needs"


def _outputs(x, w, bias, needs, dtype):
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0] if needs[2] else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


def _fwd_fake(x, w, bias, target, weight, token_weight, *options):
    reduction, dtype, with_gradient, needs, wanted = *options[5:8], *options[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[0] if reduction == "none" else (), dtype=dtype),
        x.new_empty(x.shape[0], dtype=wide),
        *(x.new_empty(x.shape[0] if want else 0, dtype=wide) for want in wanted),
        x.new_empty((), dtype=wide),
        *_outputs(x, w, bias, needs if with_gradient else (False, False, False), dtype),
    )


def _given(grads, x, w, bias, needs):
    """Gradients in their tensors' dtypes; an empty tensor for one that is not needed."""
    blank = _outputs(x, w, bias, (False, False, False), None)
    return tuple(g.to(b.dtype) if need else b for g, b, need in zip(grads, blank, needs, strict=True))


def _unit_factor(y, token_weight, total, dtype):
    """What each row's loss counts in the whole, (N,)."""
    share = (1 / total).to(dtype)
    return share.expand(len(y)).contiguous() if token_weight is None else token_weight * share


def _scale(grad, factor, backend: str) -> None:
    """``grad`` times a scalar in place, where that is not 1."""
    if grad.numel() == 0:
        return
    if backend == "triton":
        from ...kernels.cross_entropy.backward import scale

        scale(grad, factor)
    elif grad.is_cuda or factor != 1:
        grad.mul_(factor)


@define(
    "linear_cross_entropy_scale_(Tensor(a!) dx, Tensor(b!) dw, Tensor(c!) db, Tensor dloss, str backend) -> ()",
    lambda *args: None,
)
def _linear_cross_entropy_scale_(dx, dw, db, dloss, backend):
    for grad in (dx, dw, db):
        _scale(grad, dloss, backend)


@define(
    f"linear_cross_entropy_fwd({_TENSORS}, {_OPTIONS}, ScalarType dtype, bool with_gradient, {_HOW},"
    " bool[2] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _linear_cross_entropy_fwd(
    x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss, reduction,
    dtype, with_gradient, chunk, backend, compact, needs, wanted,
):  # fmt: skip
    if y.device.type == "cpu":
        error = out_of_range(y, ignore_index, w.shape[0], "linear_cross_entropy")
        if error is not None:
            raise error
    needs = needs if with_gradient else (False, False, False)
    rows = Rows(ignore_index, smoothing, softcap, scale, z_loss)
    wide = torch.promote_types(x.dtype, torch.float32)
    _, total = reduced(
        torch.zeros(len(y), dtype=wide, device=x.device), token_weight, y, weight, ignore_index, reduction
    )
    factor = _unit_factor(y, token_weight, total, wide) if with_gradient else None
    losses, lse, *others = in_chunks(
        x, w, bias, y, weight, Upstream(factor), rows, chunk, backend, compact, needs, wanted
    )
    others, grads = others[:2], others[2:]
    others = [lse.new_empty(0) if t is None else t for t in others]
    loss, _ = reduced(losses, token_weight, y, weight, ignore_index, "none" if reduction == "none" else "sum")
    if reduction == "mean":
        loss = loss / total
    return loss.to(dtype), lse, *others, total, *_given(grads, x, w, bias, needs)


def _bwd_fake(dloss, dlse, dentropy, total, x, w, bias, *rest):
    return _outputs(x, w, bias, rest[-1], None)


@define(
    f"linear_cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor total, {_TENSORS}, {_OPTIONS},"
    f" {_HOW}) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _linear_cross_entropy_bwd(
    dloss, dlse, dentropy, total, x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss,
    reduction, chunk, backend, compact, needs,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = Rows(ignore_index, smoothing, softcap, scale, z_loss)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    alone = dlse is None and dentropy is None
    scale_last = alone and reduction != "none" and x.dtype != torch.float16
    factor = _unit_factor(y, token_weight, total, wide)
    if not scale_last:
        factor = factor * dloss.to(wide) if dloss is not None else torch.zeros_like(factor)
    upstream = Upstream(factor, *(None if t is None else t.to(wide).contiguous() for t in (dlse, dentropy)))
    *_, dx, dw, db = in_chunks(
        x, w, bias, y, weight, upstream, rows, chunk, backend, compact if alone else 0, needs,
        (False, dentropy is not None),
    )  # fmt: skip
    grads = (dx, dw, db)
    grads = _given(grads, x, w, bias, needs)
    if scale_last:
        for grad in grads:
            _scale(grad, dloss, backend)
    return grads


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss, reduction,
        dtype, with_gradient, chunk, backend, compact, needs, wanted,
    ):  # fmt: skip
        options = (ignore_index, smoothing, softcap, scale, z_loss, reduction)
        return _linear_cross_entropy_fwd(
            x, w, bias, y, weight, token_weight, *options, dtype, with_gradient, chunk, backend, compact, needs,
            wanted,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options, ctx.has_gradient, ctx.how = inputs[:6], inputs[6:12], inputs[13], inputs[14:17]
        _, _, accuracy, entropy, total, *grads = output
        ctx.has_entropy = inputs[18][1]
        ctx.mark_non_differentiable(accuracy, *(() if ctx.has_entropy else (entropy,)), total, *grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, total, *grads)

    @staticmethod
    def backward(ctx, dloss, dlse, _daccuracy, dentropy, *_):
        none = (None,) * 16
        # Compiled code makes gradients of outputs that have none.
        dentropy = dentropy if ctx.has_entropy else None
        if dloss is None and dlse is None and dentropy is None:
            return None, None, None, *none
        x, w, bias, y, weight, token_weight, total, *ready = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.has_gradient and dlse is dentropy is None and not torch.is_grad_enabled() and scalable(dloss):
            # Handed out once, scaled in place, as in cross_entropy; a second backward computes them again.
            ctx.has_gradient = False
            grads = [grad.data for grad in ready]
            _linear_cross_entropy_scale_(*grads, dloss, ctx.how[1])
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *none
        ignore_index, smoothing, softcap, scale, z_loss, reduction = ctx.options

        def launch(inputs, outputs_grad, extras, needs):
            return _linear_cross_entropy_bwd(
                *outputs_grad, *extras, *inputs, y, weight, token_weight, *ctx.options, *ctx.how, needs
            )

        def formula(x, w, bias):
            return linear_cross_entropy_reference(
                x, w, y, linear_bias=bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
                label_smoothing=smoothing, softcap=softcap, logit_scale=scale, z_loss=z_loss,
                token_weight=token_weight, return_lse=True, return_entropy=True,
            )  # fmt: skip

        return *gradients(launch, formula, (x, w, bias), needs, (dloss, dlse, dentropy), (total,)), *none
