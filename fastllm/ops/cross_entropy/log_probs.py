"""Log-probabilities of targets under a linear layer: linear_cross_entropy's row losses with the sign turned."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...registry import Op, Sample, register
from ..shared.check import check_number, is_number
from ..shared.stand_ins import any_stands_in, overridden
from .call import LinearCrossEntropyCall, linear_cross_entropy_call
from .linear import linear_loss
from .linear_reference import linear_definition, shifted
from .ordinary_linear import ordinary_linear_loss
from .samples import linear_cross_entropy_cost

_NAME = "linear_log_probs"


def linear_log_probs(
    input, linear_weight, target, *, linear_bias=None, temperature=1.0, softcap=None, return_entropy=False,
    token_weight=None, shift=0, ignore_index=-100, max_workspace_mb=None,
):  # fmt: skip
    """The log-probability of each target under ``softmax(linear(input) / temperature)``, without ever holding all the
    logits.

    Preference and policy-gradient losses (:mod:`fastllm.losses`) are made of these. The code of
    :func:`fastllm.functional.linear_cross_entropy` computes the logits a chunk of rows at a time, and once more in the
    backward. This takes four matrix multiplications in all, and the workspace of one chunk. If one chunk holds all
    rows, the CPU extension keeps their logits for the backward, which takes three multiplications. If only the input
    requires a gradient, as under a frozen head, its gradient is computed in the forward and scaled in the backward,
    which takes two multiplications.

    Args:
        input: (..., D), floating point: the hidden states under the output layer.
        linear_weight: (V, D), in the same dtype.
        linear_bias: (V,) in the same dtype, or None.
        target: class indices of the input's leading shape, int64 or uint8.
        temperature: the logits are divided by it, after the soft cap; positive.
        softcap: the logits are ``softcap * tanh(logits / softcap)``, or None.
        return_entropy: also return the entropy of each target's distribution.
        token_weight: factors of the log-probabilities, of the target's shape, or None. Each belongs to the input at its
            position, also with ``shift``. It gets no gradient.
        shift: the target of each input is the one ``shift`` positions later along the last dimension; 1 for next-token
            prediction from unshifted tokens. The last ``shift`` positions count as ignored. In packed rows the last
            tokens of a sequence would take targets of the next sequence: set the first ``shift`` targets of each
            sequence to ``ignore_index`` there.
        ignore_index: targets of this value are ignored: log-probability and entropy 0, no gradient. On CPU their logits
            are not computed.
        max_workspace_mb: MiB of workspace, which decide the number of rows in a chunk, at least one. None is 1200 on
            CUDA (2400 from 16,384 rows on). Elsewhere it is 64, or more: what 1024 rows take, but no more than
            ``linear_weight`` has.

    Returns:
        The log-probabilities in nats, of the target's shape, in fp32 at least, because 16 bits are too few for the
        ratio of two policies. With ``return_entropy`` it is a pair of these and the entropies, also in nats. Both are
        differentiable: of the input, the weight and the bias, each that requires a gradient gets one.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.
        IndexError: on CPU, a class index is neither in [0, V) nor ignore_index.
        BackendError: the backend asked for cannot serve the call.
    """
    if (
        linear_bias is None and softcap is None and token_weight is None and max_workspace_mb is None
        and type(temperature) is float and temperature == 1.0 and type(shift) is int and shift == 0
        and return_entropy is False
    ):  # fmt: skip
        found = ordinary_linear_loss(_NAME, (input, linear_weight), target, ignore_index, "none")
        if found is not None:
            return found
    options: dict[str, Any] = dict(
        linear_bias=linear_bias, temperature=temperature, softcap=softcap, return_entropy=return_entropy,
        token_weight=token_weight, shift=shift, ignore_index=ignore_index, max_workspace_mb=max_workspace_mb,
    )  # fmt: skip
    if any_stands_in(input, linear_weight, target, linear_bias, token_weight):
        return overridden(linear_log_probs, input, linear_weight, target, **options)
    call = _checked(input, linear_weight, target, **options)
    log_probs, _, entropy = _rows(call)
    return (log_probs, entropy) if call.return_entropy else log_probs


def log_prob_rows(input, linear_weight, target, **options):
    """(log_probs, accuracy, entropy), None for one that is not asked for: :func:`linear_log_probs` for callers within.

    Args:
        options: linear_log_probs's, and ``return_accuracy``, as :func:`fastllm.functional.linear_cross_entropy` has it.
    """
    return _rows(_checked(input, linear_weight, target, **options))


def _rows(call: LinearCrossEntropyCall):
    wide = torch.promote_types(call.input.dtype, torch.float32)
    loss, _, accuracy, entropy = linear_loss(_NAME, call, wide)
    entropy = _of_targets(call, entropy) if call.return_entropy else None
    accuracy = accuracy.view(call.target.shape) if call.return_accuracy and accuracy is not None else None
    return 0.0 - loss, accuracy, entropy  # an ignored target's is 0, not -0


def _of_targets(call: LinearCrossEntropyCall, entropy):
    """The entropies in the targets' shape, 0 where one is ignored."""
    kept = shifted(call.target.long(), call.loss.ignore_index, call.shift) != call.loss.ignore_index
    return torch.where(kept, entropy.view(call.target.shape), 0.0)


def _checked(input, linear_weight, target, *, temperature=1.0, softcap=None, **options) -> LinearCrossEntropyCall:
    if not is_number(temperature) or not 0.0 < temperature < math.inf:
        raise ValueError(f"{_NAME}: temperature must be a number, positive and finite; got {temperature!r}")
    # softcap * tanh(x / softcap) / temperature, as the loss has it: the cap is taken of scaled logits there.
    if softcap is not None:
        check_number(_NAME, "softcap", softcap)
    capped = softcap if softcap is None or not softcap > 0 else softcap / temperature
    call = linear_cross_entropy_call(
        input, linear_weight, target, softcap=capped, logit_scale=1.0 / temperature, reduction="none", op=_NAME,
        **options,
    ).under_autocast()  # fmt: skip
    return call._replace(chunking=call.chunking._replace(skip_ignored=call.input.device.type == "cpu"))


def linear_log_probs_reference(*args, **options):
    """The definition, with all the logits, in at least fp32; takes linear_log_probs's arguments."""
    call = _checked(*args, **options)
    loss, _, _, entropy = linear_definition(call)
    log_probs = 0.0 - loss
    return (log_probs, _of_targets(call, entropy)) if call.return_entropy else log_probs


def _samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def classes(n, *shape, ignored=0.25):
        y = torch.randint(0, n, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < ignored, -100, y)

    few = 4e-4  # MiB: five rows at a time, of fp32
    yield Sample(
        "every_option",
        (make(2, 5, 8), make(21, 8), classes(21, 2, 5)),
        dict(
            linear_bias=make(21), temperature=0.7, softcap=4.0, return_entropy=True, shift=1, max_workspace_mb=few,
            token_weight=torch.rand(2, 5, device=device),
        ),
    )  # fmt: skip
    yield Sample("frozen_head", (make(6, 8), make(21, 8).detach(), classes(21, 6)))


def _cost(input, linear_weight, target, **options):
    return linear_cross_entropy_cost(input, linear_weight, target, linear_bias=options.get("linear_bias"))


register(
    Op(
        name=_NAME,
        summary="log-probability of each target under a linear layer, and entropy, in chunks, never all the logits",
        function=linear_log_probs,
        reference=linear_log_probs_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager", "triton", "native"),
        call=_checked,
    )
)
