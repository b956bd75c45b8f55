"""A linear layer and the cross-entropy of its outputs, without ever holding all the logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...backends import pick, plain_eager
from ...registry import Op, register
from ..shared.autograd import apply
from ..shared.check import check_floating
from ..shared.signature import keyword_options, keywords_of
from ..shared.stand_ins import any_stands_in, overridden
from .call import LinearCrossEntropyCall, check_whole, is_whole, linear_cross_entropy_call
from .chunks import LayerLoss, LinearCrossEntropyPlan, bytes_per_row, chunk_plan, workspace_mb
from .cross_entropy import cross_entropy
from .linear_gradients import scales_rows
from .linear_operator import LinearCrossEntropy, LinearLossNode
from .linear_reference import linear_cross_entropy_reference, linear_definition, shifted, whole_logits
from .loss import loss_dtype, out_of_range
from .ordinary_linear import ordinary_linear_loss
from .samples import linear_cross_entropy_cost, linear_cross_entropy_samples


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
    label_smoothing=0.0, options=None, softcap=None, logit_scale=1.0, z_loss=0.0, token_weight=None, shift=0,
    max_workspace_mb=None, max_targets=None, recompute=False, return_lse=False, return_accuracy=False,
    return_entropy=False,
):  # fmt: skip
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without ever holding all the logits.

    The logits are computed in chunks of rows. Each chunk is overwritten with its gradient and multiplied into the
    gradients of the input and the layer. This takes three matrix multiplications in all, and the workspace of one
    chunk.

    Args:
        input: (..., D), floating point.
        linear_weight: (V, D), in the same dtype.
        linear_bias: (V,) in the same dtype, or None.
        target: class indices of the input's leading shape, int64 or uint8. Also torch's other forms: class
            probabilities (N, V), or a linear_weight (V, d1, ..., D) with bias (V, d1, ...); for these all the logits
            are held, and token_weight, shift, max_targets, return_accuracy and return_entropy are refused.
        options: torch's chunking options; accepted, but without effect: ``max_workspace_mb`` decides here.
        weight, ignore_index (None: -100), label_smoothing, softcap, logit_scale, z_loss: as in
            :func:`fastllm.functional.cross_entropy`. On CPU ignored rows are left out before anything is computed.
        max_targets: at most this many targets are not ignored, a number that a masked-LM head knows. With it, CUDA too
            computes no more rows. Without it only the device knows their number, and the host does not wait for it. If
            more are not ignored, a ValueError is raised on CPU, and a device-side assert on CUDA.
        reduction: "mean" (over class weight times token weight, summed over the targets that are not ignored), "sum"
            or "none".
        token_weight: factors of the losses, of the target's shape, or None. Each belongs to the input at its position,
            also with ``shift``. It gets no gradient.
        shift: the target of each input is the one ``shift`` positions later along the last dimension; 1 for next-token
            prediction from unshifted tokens. The last ``shift`` positions count as ignored.
        max_workspace_mb: MiB of workspace, which decide the number of rows in a chunk, at least one. None is 1200 on
            CUDA (2400 from 16,384 rows on). Elsewhere it is 64, or more: what 1024 rows take, but no more than
            ``linear_weight`` has. See :func:`linear_cross_entropy_plan`.
        recompute: keep no gradients between forward and backward. The backward computes the logits again, a fourth
            matrix multiplication. fp16 (whose gradients of a mean would underflow before a loss scale reaches them),
            compiled code and a second backward always do so. "none" does so too, except where the extension serves
            and one chunk holds all rows: their logits then stay for the backward, three multiplications in all.
        return_lse: also return logsumexp of every position's logits, those of ignored targets too.
        return_accuracy: also return 1 for each target whose logit is the largest or equal to it, else 0; 0 for ignored
            targets. Not differentiable.
        return_entropy: also return the entropy of every position's softmax, in nats, those of ignored targets too.

    Returns:
        The loss in the input's dtype (fp32 under autocast), a scalar or of the target's shape. Row losses and the
        layer's gradients are summed in fp32. With any ``return_...`` it is a tuple of the loss and the results that
        they name, in the order lse, accuracy, entropy. Each of these has the target's shape, in at least fp32. lse and
        entropy are differentiable. If their gradients are needed, the logits are computed once more.

    On a CPU with matrix units (AMX) or vector products of bf16 (AVX-512 BF16), the extension's bf16 products with fp32
    sums add the layer's gradient over the chunks. On other CPUs these products are in fp32, whatever the inputs' dtype,
    because PyTorch would round each chunk's 16-bit product to 16 bits.

    PyTorch's operators compute all the logits of DTensors. They are split over ranks where ``linear_weight`` is.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.
        IndexError: on CPU, a class index is neither in [0, V) nor ignore_index.
        BackendError: the backend asked for cannot serve the call.
    """
    if (
        linear_bias is None and weight is None and softcap is None and token_weight is None and max_workspace_mb is None
        and max_targets is None and options is None
        and type(label_smoothing) is type(logit_scale) is type(z_loss) is float
        and label_smoothing == z_loss == 0.0 and logit_scale == 1.0 and type(shift) is int and shift == 0
        and recompute is return_lse is return_accuracy is return_entropy is False
    ):  # fmt: skip
        ignored = -100 if ignore_index is None else ignore_index
        found = ordinary_linear_loss("linear_cross_entropy", (input, linear_weight), target, ignored, reduction)
        if found is not None:
            return found
    if any_stands_in(input, linear_weight, target, linear_bias, weight, token_weight):
        return overridden(
            linear_cross_entropy, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
            softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, token_weight=token_weight, shift=shift,
            max_workspace_mb=max_workspace_mb, max_targets=max_targets, recompute=recompute, return_lse=return_lse,
            return_accuracy=return_accuracy, return_entropy=return_entropy,
        )  # fmt: skip
    if is_whole(linear_weight, target):
        refused = dict(
            token_weight=token_weight is not None, shift=shift, max_targets=max_targets is not None,
            return_accuracy=return_accuracy, return_entropy=return_entropy,
        )  # fmt: skip
        check_whole(input, linear_weight, target, linear_bias, ignore_index, refused)
        return cross_entropy(
            whole_logits(input, linear_weight, linear_bias, input.dtype), target, weight,
            ignore_index=-100 if ignore_index is None else ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss,
            return_lse=return_lse,
        )  # fmt: skip
    call = _checked(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
        z_loss=z_loss, token_weight=token_weight, shift=shift, max_workspace_mb=max_workspace_mb,
        max_targets=max_targets, recompute=recompute, return_lse=return_lse, return_accuracy=return_accuracy,
        return_entropy=return_entropy,
    )  # fmt: skip
    loss, *rows = linear_loss("linear_cross_entropy", call, loss_dtype(call.input, target))
    asked = zip((return_lse, return_accuracy, return_entropy), rows, strict=True)
    others = [values.view(target.shape) for want, values in asked if want and values is not None]
    return (loss, *others) if others else loss


def _checked(*args, **options) -> LinearCrossEntropyCall:
    return linear_cross_entropy_call(*args, **options).under_autocast()


def linear_loss(op: str, call: LinearCrossEntropyCall, dtype: torch.dtype):
    """(loss in ``dtype``, lse, accuracy, entropy) by the backend that serves ``op``, the last three a value a row."""
    choice = pick(op, call)
    if plain_eager(choice.backend, call.tensors()):
        loss, *rows = linear_definition(call)
        return loss.to(dtype), *rows
    try:
        return _in_chunks(call, dtype, choice.backend)
    except IndexError:
        # The operator has the target of each row of logits.
        error = out_of_range(call.target, call.loss.ignore_index, len(call.linear_weight), op, shift=call.shift)
        if error is None:
            raise
        raise error from None


def _in_chunks(call: LinearCrossEntropyCall, dtype: torch.dtype, backend: str):
    """(loss, lse, accuracy, entropy), the last three (N,), by the backend's rows of logits."""
    x, target, loss = call.input, call.target, call.loss
    need_dx, need_dw, need_db = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in call.layer())
    needs = need_dx, need_dw, need_db
    alone = not (call.return_lse or call.return_entropy)
    with_gradient = (
        any(needs) and (loss.reduction != "none" or (alone and scales_rows(needs))) and not call.recompute
        and x.dtype != torch.float16 and not torch.compiler.is_compiling()
    )  # fmt: skip
    keep = (
        any(needs) and loss.reduction == "none" and not with_gradient and not call.recompute
        and not torch.compiler.is_compiling()
    )  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = target.dtype == torch.int64 and target.dim() == 1 and not call.shift
    node = LinearLossNode(
        LayerLoss(
            target if plain else shifted(target.long(), loss.ignore_index, call.shift).reshape(-1),
            None if call.weight is None else call.weight.contiguous(),
            None if call.token_weight is None else call.token_weight.reshape(-1).to(wide),
            loss, call.chunking, backend, call.op,
        ),
        dtype, with_gradient, needs, call.return_accuracy, call.return_entropy, keep,
    )  # fmt: skip
    # Each view would be one more node of the graph.
    x = x if x.dim() == 2 else x.reshape(target.numel(), x.shape[-1])
    value, *rows = apply(LinearCrossEntropy, x, call.linear_weight, call.linear_bias, node)[:4]
    return value.view(target.shape) if loss.reduction == "none" and target.dim() != 1 else value, *rows


def linear_cross_entropy_plan(
    input, linear_weight, *, reduction="mean", softcap=None, max_workspace_mb=None, max_targets=None, recompute=False,
    return_entropy=False,
) -> LinearCrossEntropyPlan:  # fmt: skip
    """How :func:`linear_cross_entropy` would run such a call: rows at a time, workspace, number of products.

    Nothing is computed, and no tensor of the logits' size is made. Print the plan before a run.

    Args:
        input: (..., D) hidden states. Its ``requires_grad``, and the weight's, decide which products there are.
        linear_weight: (V, D).
        reduction, softcap, max_workspace_mb, max_targets, recompute, return_entropy: as in linear_cross_entropy.

    Raises:
        TypeError, ValueError: linear_cross_entropy would refuse the call.
    """
    check_floating("linear_cross_entropy_plan", "input", input)
    target = torch.empty(input.shape[:-1], dtype=torch.int64, device=input.device)
    call = linear_cross_entropy_call(
        input, linear_weight, target, reduction=reduction, softcap=softcap, max_workspace_mb=max_workspace_mb,
        max_targets=max_targets, recompute=recompute, return_entropy=return_entropy,
    )  # fmt: skip
    backend = pick("linear_cross_entropy", call).backend
    tokens, most = target.numel(), call.chunking.max_targets
    row_bytes = bytes_per_row(len(linear_weight), input.dtype, backend, softcap is not None, return_entropy)
    rows = tokens if most is None else min(tokens, most)
    plan = chunk_plan(rows, row_bytes, workspace_mb(call.chunking, linear_weight, rows, row_bytes))
    needs = (input.requires_grad, linear_weight.requires_grad, False)
    if not torch.is_grad_enabled() or not any(needs):
        return replace(plan, lane="1 matmul, loss only")
    kept = backend == "native" and plan.chunks == 1
    by_row = reduction == "none" and (return_entropy or not scales_rows(needs))
    again = recompute or (not kept if by_row else input.dtype == torch.float16)
    return replace(plan, lane=f"{1 + again + sum(needs)} matmuls, {'recompute' if again else 'no recompute'}")


# torch has the class since 2.13; before, ours stands on what torch's is made of.
_Loss = torch.nn.modules.loss._WeightedLoss
if TYPE_CHECKING:
    _Base = _Loss
else:
    _Base = getattr(torch.nn, "LinearCrossEntropyLoss", _Loss)


class LinearCrossEntropyLoss(_Base):
    """The loss of a linear layer's outputs, which are never held all at once. The layer is its submodule ``linear``.

    ``torch.nn.LinearCrossEntropyLoss``'s state_dict keys and arguments up to ``options``, and a subclass of it where
    torch has it (>= 2.13); the other arguments are :func:`linear_cross_entropy`'s. ``forward(input, target,
    token_weight=None)``.
    """

    @keywords_of(linear_cross_entropy, but=("linear_bias", "token_weight"))
    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None, reduction="mean",
        weight=None, ignore_index=None, label_smoothing=0.0, options=None, **extras,
    ):  # fmt: skip
        _Loss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.extras = extras

    def _layer(self):
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            weight = weight.unflatten(0, (self.num_classes, *self.out_features))
            bias = None if bias is None else bias.unflatten(0, (self.num_classes, *self.out_features))
        return weight, bias

    def forward(self, input, target, token_weight=None):
        linear_weight, linear_bias = self._layer()
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            token_weight=token_weight, **self.extras,
        )  # fmt: skip

    def plan(self, input) -> LinearCrossEntropyPlan:
        """How :meth:`forward` would run on ``input``, with class indices: print it before running."""
        names = keyword_options(linear_cross_entropy_plan)
        extras = {name: value for name, value in self.extras.items() if name in names}
        return linear_cross_entropy_plan(input, self.linear.weight, reduction=self.reduction, **extras)

    def extra_repr(self):
        linear = self.linear
        every = dict(
            in_features=linear.in_features, num_classes=self.num_classes, out_features=self.out_features,
            bias=linear.bias is not None, reduction=self.reduction, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, options=self.options, **self.extras,
        )  # fmt: skip
        return ", ".join(f"{name}={value}" for name, value in every.items())


class LinearCrossEntropyHead(torch.nn.Linear):
    """A model's output layer that returns the loss instead of the logits if it gets the targets.

    It replaces a ``torch.nn.Linear``. It has the same arguments and state_dict keys, and is always called through
    ``forward``, so that DDP, FSDP, tied weights and hooks see it. ``forward(input)`` returns logits, and
    ``forward(input, target, **options)`` returns :func:`linear_cross_entropy` of them.
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
        samples=linear_cross_entropy_samples,
        cost=linear_cross_entropy_cost,
        backends=("eager", "triton", "native"),
        module=LinearCrossEntropyLoss,
        call=_checked,
    )
)
