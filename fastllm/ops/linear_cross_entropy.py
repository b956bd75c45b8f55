"""A linear layer and the cross-entropy of its outputs, without ever holding all the logits."""

from __future__ import annotations

import torch

from ..registry import Op, define, pick, register
from ._autograd import gradients
from ._cross_entropy import check_options, loss_dtype, out_of_range
from ._linear_cross_entropy import (
    Plan,
    Rows,
    check_linear,
    check_whole,
    in_chunks,
    is_whole,
    linear_cost,
    linear_samples,
    plan,
    shifted,
    whole_logits,
)
from .cross_entropy import cross_entropy, cross_entropy_reference

_TENSORS = "Tensor x, Tensor w, Tensor? bias, Tensor target, Tensor? weight, Tensor? token_weight"
_OPTIONS = "int ignore_index, float smoothing, float? softcap, float scale, float z_loss, str reduction"
_HOW = "int chunk, bool fused, bool compact, bool[3] needs"


def _reduced(rows, token_weight, y, weight, ignore_index: int, reduction: str):
    """(the loss of fp32 rows, what its mean divides by)."""
    if token_weight is not None:
        rows = rows * token_weight
    total = rows.new_ones(())
    if reduction == "mean":
        keep = y != ignore_index
        mass = keep.to(rows.dtype) if weight is None else weight.to(rows.dtype)[torch.where(keep, y, 0)] * keep
        total = (mass if token_weight is None else mass * token_weight).sum()
    return rows if reduction == "none" else rows.sum() / total, total


def linear_cross_entropy_reference(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, options=None, softcap=None, logit_scale=1.0, z_loss=0.0, token_weight=None, shift=0,
    max_workspace_mb=None, recompute=False, return_lse=False,
):  # fmt: skip
    """The definition, with all the logits, in at least fp32."""
    ignore_index = -100 if ignore_index is None else ignore_index
    if is_whole(linear_weight, target):
        logits = whole_logits(input, linear_weight, linear_bias, torch.promote_types(input.dtype, torch.float32))
        loss = cross_entropy_reference(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, return_lse=return_lse,
        )  # fmt: skip
        dtype = loss_dtype(input, target)
        return (loss[0].to(dtype), loss[1]) if return_lse else loss.to(dtype)
    wide = torch.promote_types(input.dtype, torch.float32)
    logits = input.to(wide).reshape(-1, input.shape[-1]) @ linear_weight.to(wide).t()
    if linear_bias is not None:
        logits = logits + linear_bias.to(wide)
    y = shifted(target, ignore_index, shift).reshape(-1)
    rows, lse = cross_entropy_reference(
        logits, y, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing,
        softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, return_lse=True,
    )  # fmt: skip
    token_weight = None if token_weight is None else token_weight.reshape(-1).to(wide)
    loss, _ = _reduced(rows, token_weight, y, weight, ignore_index, reduction)
    loss = loss.to(loss_dtype(input, target))
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse.view(target.shape)) if return_lse else loss


def _outputs(x, w, bias, needs, dtype):
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0] if needs[2] else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


def _fwd_fake(x, w, bias, target, weight, token_weight, *options):
    reduction, dtype, with_gradient, needs = options[5], options[6], options[7], options[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[0] if reduction == "none" else (), dtype=dtype),
        x.new_empty(x.shape[0], dtype=wide),
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


def _scale(grad, factor, fused: bool) -> None:
    """``grad`` times a scalar in place, where that is not 1."""
    if grad.numel() == 0:
        return
    if fused:
        from ..kernels._cross_entropy_backward import scale_rows

        scale_rows(grad.view(len(grad), -1, 1), factor)
    elif grad.is_cuda or factor != 1:
        grad.mul_(factor)


@define(
    "linear_cross_entropy_scale_(Tensor(a!) dx, Tensor(b!) dw, Tensor(c!) db, Tensor dloss, bool fused) -> ()",
    lambda *args: None,
)
def _linear_cross_entropy_scale_(dx, dw, db, dloss, fused):
    for grad in (dx, dw, db):
        _scale(grad, dloss, fused)


@define(
    f"linear_cross_entropy_fwd({_TENSORS}, {_OPTIONS}, ScalarType dtype, bool with_gradient, {_HOW})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _linear_cross_entropy_fwd(
    x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss, reduction,
    dtype, with_gradient, chunk, fused, compact, needs,
):  # fmt: skip
    if y.device.type == "cpu":
        error = out_of_range(y, ignore_index, w.shape[0], "linear_cross_entropy")
        if error is not None:
            raise error
    needs = needs if with_gradient else (False, False, False)
    rows = Rows(ignore_index, smoothing, softcap, scale, z_loss)
    wide = torch.promote_types(x.dtype, torch.float32)
    _, total = _reduced(
        torch.zeros(len(y), dtype=wide, device=x.device), token_weight, y, weight, ignore_index, reduction
    )
    factor = _unit_factor(y, token_weight, total, wide) if with_gradient else None
    losses, lse, *grads = in_chunks(x, w, bias, y, weight, factor, None, rows, chunk, fused, compact, needs)
    loss, _ = _reduced(losses, token_weight, y, weight, ignore_index, "none" if reduction == "none" else "sum")
    if reduction == "mean":
        loss = loss / total
    return loss.to(dtype), lse, total, *_given(grads, x, w, bias, needs)


def _bwd_fake(dloss, dlse, total, x, w, bias, *rest):
    return _outputs(x, w, bias, rest[-1], None)


@define(
    f"linear_cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor total, {_TENSORS}, {_OPTIONS}, {_HOW})"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _linear_cross_entropy_bwd(
    dloss, dlse, total, x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss, reduction,
    chunk, fused, compact, needs,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = Rows(ignore_index, smoothing, softcap, scale, z_loss)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    scale_last = dlse is None and reduction != "none" and x.dtype != torch.float16
    factor = _unit_factor(y, token_weight, total, wide)
    if not scale_last:
        factor = factor * dloss.to(wide) if dloss is not None else torch.zeros_like(factor)
    dlse = None if dlse is None else dlse.to(wide).contiguous()
    _, _, *grads = in_chunks(x, w, bias, y, weight, factor, dlse, rows, chunk, fused, compact and dlse is None, needs)
    grads = _given(grads, x, w, bias, needs)
    if scale_last:
        for grad in grads:
            _scale(grad, dloss, fused)
    return grads


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        x, w, bias, y, weight, token_weight, ignore_index, smoothing, softcap, scale, z_loss, reduction,
        dtype, with_gradient, chunk, fused, compact, needs,
    ):  # fmt: skip
        options = (ignore_index, smoothing, softcap, scale, z_loss, reduction)
        return _linear_cross_entropy_fwd(
            x, w, bias, y, weight, token_weight, *options, dtype, with_gradient, chunk, fused, compact, needs
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options, ctx.has_gradient, ctx.how = inputs[:6], inputs[6:12], inputs[13], inputs[14:17]
        _, _, total, *grads = output
        ctx.mark_non_differentiable(total, *grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, total, *grads)

    @staticmethod
    def backward(ctx, dloss, dlse, *_):
        none = (None,) * 15
        if dloss is None and dlse is None:
            return None, None, None, *none
        x, w, bias, y, weight, token_weight, total, *ready = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.has_gradient and dlse is None and not torch.is_grad_enabled():
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
            loss, lse = linear_cross_entropy_reference(
                x, w, y, linear_bias=bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
                label_smoothing=smoothing, softcap=softcap, logit_scale=scale, z_loss=z_loss,
                token_weight=token_weight, return_lse=True,
            )  # fmt: skip
            return loss, lse

        return *gradients(launch, formula, (x, w, bias), needs, (dloss, dlse), (total,)), *none


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, options=None, softcap=None, logit_scale=1.0, z_loss=0.0, token_weight=None, shift=0,
    max_workspace_mb=None, recompute=False, return_lse=False,
):  # fmt: skip
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without ever holding all the logits.

    Rows of logits are computed a chunk at a time, turned into their gradient where they stand, and multiplied into the
    gradients of the input and the layer: three matrix multiplications in all, and a workspace of one chunk.

    Args:
        input: (..., D), floating point. linear_weight: (V, D), in the same dtype. linear_bias: (V,) or None.
        target: class indices of the input's leading shape, int64 or uint8. Also torch's other forms: class
            probabilities (N, V), or a linear_weight (V, d1, ..., D) with bias (V, d1, ...); for these all the logits
            are held, and token_weight and shift are refused.
        options: torch's chunking options; accepted and without effect, ``max_workspace_mb`` decides here.
        weight, ignore_index (None: -100), label_smoothing, softcap, logit_scale, z_loss: as in
            :func:`fastllm.functional.cross_entropy`. On CPU ignored rows are left out before anything is computed; on
            CUDA finding them would make the host wait.
        reduction: "mean" (over class weight times token weight of the targets that count), "sum" or "none".
        token_weight: factors on the losses, of the target's shape, or None. No gradient of its own.
        shift: each input is held against the target ``shift`` positions further on along the last dimension; 1 for
            next-token prediction from unshifted tokens. The last ``shift`` positions count as ignored.
        max_workspace_mb: MiB of workspace that decide the chunk; None for 1200 on CUDA, 64 elsewhere. One row at the
            least. See :func:`linear_cross_entropy_plan`.
        recompute: keep no gradients between forward and backward; the logits are computed again there, a fourth
            matrix multiplication. So it is anyway for "none", in fp16 (whose gradients of a mean would underflow before
            a loss scale reaches them), in compiled code and in a second backward.
        return_lse: also return logsumexp of every position's logits; ignored rows are then computed too.

    Returns:
        The loss in the input's dtype (fp32 under autocast), a scalar or of the target's shape. Row losses and the
        layer's gradients are summed in fp32. With ``return_lse`` a pair (loss, lse), both differentiable.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.
        IndexError: on CPU, a class index is neither in [0, V) nor ignore_index.
        BackendError: the backend asked for cannot serve the call.
    """
    if is_whole(linear_weight, target):
        check_whole(input, linear_weight, target, linear_bias, ignore_index, token_weight, shift)
        return cross_entropy(
            whole_logits(input, linear_weight, linear_bias, input.dtype), target, weight,
            ignore_index=-100 if ignore_index is None else ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss,
            return_lse=return_lse, inplace=True,
        )  # fmt: skip
    ignore_index = -100 if ignore_index is None else ignore_index
    check_linear(input, linear_weight, target, linear_bias, token_weight, shift, max_workspace_mb)
    check_options(
        "linear_cross_entropy", input, weight, linear_weight.shape[0], reduction, label_smoothing, softcap, logit_scale,
        z_loss,
    )  # fmt: skip
    dtype = loss_dtype(input, target)
    if torch.is_autocast_enabled(input.device.type):
        narrow = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(narrow), linear_weight.to(narrow)
        linear_bias = None if linear_bias is None else linear_bias.to(narrow)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"linear_cross_entropy: {name} is {tensor.dtype}, input {input.dtype}; they must agree")
    if weight is not None and weight.requires_grad:
        raise ValueError("linear_cross_entropy: weight requires a gradient, which class weights get nowhere")
    fused = pick("linear_cross_entropy", input, linear_weight, linear_bias, weight) == "triton"
    needs = tuple(
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (input, linear_weight, linear_bias)
    )
    with_gradient = (
        any(needs) and reduction != "none" and not recompute and input.dtype != torch.float16
        and not torch.compiler.is_compiling()
    )  # fmt: skip
    x = input.reshape(-1, input.shape[-1])
    y = shifted(target.long(), ignore_index, shift).reshape(-1)
    wide = torch.promote_types(input.dtype, torch.float32)
    chunk = plan(
        x.shape[0], linear_weight.shape[0], input.dtype, input.device.type, fused, max_workspace_mb, softcap, ""
    ).rows
    compact = input.device.type == "cpu" and not return_lse
    loss, lse, *_ = _LinearCrossEntropy.apply(
        x, linear_weight, linear_bias, y, None if weight is None else weight.contiguous(),
        None if token_weight is None else token_weight.reshape(-1).to(wide),
        int(ignore_index), float(label_smoothing), None if softcap is None else float(softcap), float(logit_scale),
        float(z_loss), reduction, dtype, with_gradient, chunk, fused, compact, needs,
    )  # fmt: skip
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse.view(target.shape)) if return_lse else loss


def linear_cross_entropy_plan(
    input, linear_weight, *, reduction="mean", softcap=None, max_workspace_mb=None, recompute=False
) -> Plan:
    """How :func:`linear_cross_entropy` would run such a call: print it before running."""
    fused = pick("linear_cross_entropy", input, linear_weight) == "triton"
    if not torch.is_grad_enabled() or not (input.requires_grad or linear_weight.requires_grad):
        lane = "1 matmul, loss only"
    elif reduction == "none" or recompute or input.dtype == torch.float16:
        lane = "4 matmuls, recompute"
    else:
        lane = "3 matmuls, no recompute"
    tokens = input.numel() // input.shape[-1]
    return plan(tokens, len(linear_weight), input.dtype, input.device.type, fused, max_workspace_mb, softcap, lane)


class LinearCrossEntropyLoss(torch.nn.Module):
    """The loss of a linear layer's outputs, which are never held all at once; owns the layer as ``linear``.

    ``torch.nn.LinearCrossEntropyLoss``'s state_dict keys (torch >= 2.13) and its arguments up to ``label_smoothing``;
    the others are :func:`linear_cross_entropy`'s. ``forward(input, target, token_weight=None)``.
    """

    def __init__(
        self, in_features, num_classes, *, bias=False, weight=None, reduction="mean", ignore_index=-100,
        label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0, shift=0, max_workspace_mb=None, recompute=False,
        return_lse=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = dict(
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
            logit_scale=logit_scale, z_loss=z_loss, shift=shift, max_workspace_mb=max_workspace_mb, recompute=recompute,
            return_lse=return_lse,
        )  # fmt: skip

    def forward(self, input, target, token_weight=None):
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight,
            token_weight=token_weight, **self.options,
        )  # fmt: skip

    def plan(self, input) -> Plan:
        """How :meth:`forward` would run on ``input``: print it before running."""
        names = ("reduction", "softcap", "max_workspace_mb", "recompute")
        return linear_cross_entropy_plan(input, self.linear.weight, **{name: self.options[name] for name in names})

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LinearCrossEntropyHead(torch.nn.Linear):
    """A model's output layer that gives the loss instead of the logits where it is given the targets.

    In place of a ``torch.nn.Linear``: same arguments, same state_dict keys, and always called through ``forward``, so
    that DDP, FSDP, tied weights and hooks see it. ``forward(input)`` gives logits and
    ``forward(input, target, **options)`` :func:`linear_cross_entropy` of them.
    """

    def forward(self, input, target=None, **options):
        if target is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, target, linear_bias=self.bias, **options)


register(
    Op(
        name="linear_cross_entropy",
        summary="linear layer and cross-entropy in chunks, never all the logits; token weights, shift, z-loss",
        function=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        samples=linear_samples,
        cost=linear_cost,
        backends=("eager", "triton"),
        module=LinearCrossEntropyLoss,
    )
)
