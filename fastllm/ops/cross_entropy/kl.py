"""The divergence of a student's distribution from a teacher's, without ever holding all the logits of either."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import pick, plain_eager
from ...registry import Cost, Op, Sample, register
from ..shared.autograd import apply
from ..shared.stand_ins import any_stands_in, overridden
from .kl_call import linear_kl_div_call
from .kl_operator import KLNode, LinearKLDiv, linear_kl_div_fwd
from .kl_rows import linear_kl_div_definition


def linear_kl_div(
    input, linear_weight, teacher_input, teacher_weight=None, *, target=None, direction="forward", beta=0.5,
    temperature=1.0, ignore_index=-100, reduction="mean", max_workspace_mb=None, linear_bias=None, teacher_bias=None,
    teacher_indices=None, softcap=None, teacher_softcap=None,
):  # fmt: skip
    """The divergence of ``softmax(linear(input))`` from a teacher's distribution: for distillation, a chunk at a time.

    p is the teacher's distribution and q the student's, both from logits divided by the temperature T. A position's
    loss is T^2 times

    - "forward": KL(p || q), the mean under the teacher of log p - log q;
    - "reverse": KL(q || p);
    - "jsd": beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalised Jensen-Shannon
      divergence (Agarwal et al. 2024, arXiv:2306.13649, equation 1).

    The factor T^2 keeps the gradients' size as T changes (Hinton et al. 2015, arXiv:1503.02531, section 2). Divide by
    T^2 to compare with code that leaves it out, such as TRL's and Liger's losses.

    The teacher is one of three:

    - a layer: ``teacher_input`` (..., D') are hidden states and ``teacher_weight`` is (V, D'); D' may differ from D;
    - logits: ``teacher_input`` (..., V) alone;
    - its k most probable classes, from a cache: ``teacher_input`` (..., k) are their probabilities at this temperature
      and ``teacher_indices`` (..., k) the classes. They are used as they are: all other classes have probability 0, and
      nothing is scaled to sum to 1. "reverse" would be infinite, so it is refused.

    Args:
        input: (..., D), floating point: the student's hidden states.
        linear_weight: (V, D), in the same dtype.
        linear_bias: (V,) in the same dtype, or None.
        teacher_input, teacher_weight, teacher_bias, teacher_indices: see above. The teacher's dtype may differ. Each
            tensor of the student and the teacher that requires a gradient gets one. Detach the tensors of a frozen
            teacher, or compute them under ``torch.no_grad``.
        target: integers of the input's leading shape; positions where it is not ``ignore_index`` count. None: all
            count. On CPU nothing is computed for the others.
        beta: the teacher's share in "jsd", between 0 and 1, both excluded.
        temperature: positive.
        reduction: "mean" over the positions that count, "sum" or "none".
        max_workspace_mb: MiB for the logits of a chunk, the student's and those of a teacher's layer. None is 1200 on
            CUDA and 128 elsewhere. A chunk has at least one row. About ten more fp32 tensors of 2^18 numbers, 2^24 on
            CUDA, are needed.
        softcap, teacher_softcap: the logits are ``softcap * tanh(logits / softcap)``, or None.

    Returns:
        The loss in nats, in fp32 at least: a scalar, or of the input's leading shape for "none", where positions that
        do not count have 0. For "mean" and "sum" the gradients are computed with the loss, except in fp16 and in
        compiled code. For "none" they are computed in the backward, with the logits once more.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit; the teacher has another vocabulary; on
            CPU, no position counts toward a mean, or a probability is below 0.
        IndexError: on CPU, an index in ``teacher_indices`` is not a class.
        BackendError: the backend asked for cannot serve the call.
    """
    layers = (input, linear_weight, teacher_input, teacher_weight)
    options: dict[str, Any] = dict(
        target=target, direction=direction, beta=beta, temperature=temperature, ignore_index=ignore_index,
        reduction=reduction, max_workspace_mb=max_workspace_mb, linear_bias=linear_bias, teacher_bias=teacher_bias,
        teacher_indices=teacher_indices, softcap=softcap, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    if any_stands_in(*layers, target, linear_bias, teacher_bias, teacher_indices):
        return overridden(linear_kl_div, *layers, **options)
    call = linear_kl_div_call(*layers, **options)
    backend = pick("linear_kl_div", call).backend
    if plain_eager(backend, call.tensors()):
        return linear_kl_div_definition(call)
    call = call.rows()
    needs = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in call.layers())
    with_gradient = (
        any(needs) and reduction != "none" and call.input.dtype != torch.float16 and not torch.compiler.is_compiling()
    )
    if any(needs):
        node = KLNode(call.teacher_indices, call.target, call.divergence, backend, with_gradient, needs)
        loss = apply(LinearKLDiv, *call.layers(), node)[0]
    else:
        loss = linear_kl_div_fwd(call, backend, False, needs)[0]
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


def linear_kl_div_reference(*args, **options):
    """The definition, with all the logits of both, in at least fp32; takes linear_kl_div's arguments."""
    return linear_kl_div_definition(linear_kl_div_call(*args, **options))


def _samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def counts(*shape):
        return torch.where(torch.rand(shape, device=device) < 0.3, -100, 1)

    few = 8e-4  # MiB: four rows at a time, of fp32
    yield Sample("head", (make(7, 8), make(21, 8), make(7, 6).detach(), make(21, 6).detach()))
    yield Sample(
        "jsd_of_both",
        (make(2, 5, 8), make(21, 8), make(2, 5, 6), make(21, 6)),
        dict(
            linear_bias=make(21), teacher_bias=make(21), target=counts(2, 5), direction="jsd", beta=0.3, softcap=4.0,
            teacher_softcap=5.0, temperature=2.0, max_workspace_mb=few,
        ),
    )  # fmt: skip
    yield Sample(
        "logits", (make(6, 8), make(21, 8), make(6, 21)), dict(direction="reverse", reduction="none", temperature=0.7)
    )
    yield Sample(
        "top_k",
        (make(6, 8), make(21, 8), make(6, 3).softmax(-1).detach().to(dtype)),
        dict(teacher_indices=torch.rand(6, 21, device=device).argsort(1)[:, :3], reduction="sum", max_workspace_mb=few),
    )


def _cost(input, linear_weight, teacher_input, teacher_weight=None, **options) -> Cost:
    """Inputs and weights in; backward: their gradients out. A product for each layer, two more for each gradient."""
    given = [t for t in (input, linear_weight, teacher_input, teacher_weight) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in given)
    out = sum(t.numel() * t.element_size() for t in given if t.requires_grad)
    rows = input.numel() // max(input.shape[-1], 1)
    layers = [t for t in (linear_weight, teacher_weight) if t is not None]
    wanted = (
        [(linear_weight, input)]
        if teacher_weight is None
        else [(linear_weight, input), (teacher_weight, teacher_input)]
    )
    backward = sum(2 * rows * w.numel() * (w.requires_grad + x.requires_grad) for w, x in wanted)
    return Cost(moved, moved + out, sum(2 * rows * w.numel() for w in layers), backward)


register(
    Op(
        name="linear_kl_div",
        summary="forward, reverse or Jensen-Shannon divergence from a teacher, in chunks, never all the logits",
        function=linear_kl_div,
        reference=linear_kl_div_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager", "native"),
        call=linear_kl_div_call,
    )
)
