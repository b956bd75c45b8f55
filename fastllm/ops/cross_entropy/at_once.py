"""A linear layer's loss where one chunk holds all logits, by one call of the extension (csrc/cpu/linear_loss.cpp).

A product leaves little else in the caches, so what Python does between products takes several times as long as usual:
of 128 x 768 x 4096 in bfloat16, forward and backward, 0.9 of 7.5 ms on one core of an AMD EPYC with AVX-512.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import extension
from ..shared import onednn
from .chunks import LayerLoss, is_one_chunk
from .operator import LossGradients
from .products import Layer, gradients_are_torchs
from .rows import Extras

_NO_EXTRAS = Extras()


class AtOnce(NamedTuple):
    """What one call computes: losses, the logits to ``keep``, gradients of x and weight.

    ``total``: what a mean and the gradients are divided by, 0 for the number of targets that are not ignored.
    ``mean``: the dtype of the rows' sum over ``total``, None for a loss a row.
    """

    total: float
    mean: torch.dtype | None
    keep: bool
    extras: Extras
    needs: tuple[bool, bool]

    @staticmethod
    def of(
        call: LayerLoss, needs, mean: torch.dtype | None = None, extras: Extras = _NO_EXTRAS, *, keep: bool = False
    ) -> AtOnce:
        """What is asked of ``call``."""
        return AtOnce(0.0 if call.loss.reduction == "mean" else 1.0, mean, keep, extras, needs)


class Found(NamedTuple):
    """What it returns, None for what was not wanted. ``loss`` is () or (N,), the next three are (N,)."""

    loss: torch.Tensor
    lse: torch.Tensor
    accuracy: torch.Tensor | None
    entropy: torch.Tensor | None
    logits: torch.Tensor | None
    dx: torch.Tensor | None
    dw: torch.Tensor | None


def _fake(x, weight, target, *others):
    *_, mean, keep, accuracy, entropy, need_x, need_weight = others
    rows, wide = len(x), torch.promote_types(x.dtype, torch.float32)
    numbers = (x.new_empty(n, dtype=wide) for n in (rows, rows * accuracy, rows * entropy))
    grads = (x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0))
    loss = x.new_empty(rows, dtype=wide) if mean is None else x.new_empty((), dtype=mean)
    return True, loss, *numbers, x.new_empty((rows, len(weight)) if keep else 0), *grads


_counts = extension.operator("linear_loss_counts", lambda x, target, *others: len(target))
linear_rows = extension.operator("linear_loss_rows", _fake)


def _serves(layer: Layer, call: LayerLoss) -> bool:
    if call.backend != "native" or not (call.weight is call.token_weight is call.chunking.max_targets is None):
        return False
    return gradients_are_torchs(layer) and is_one_chunk(layer, call)


def at_once(
    layer: Layer, call: LayerLoss, wanted: AtOnce, upstream: LossGradients | None = None,
    logits: torch.Tensor | None = None,
) -> Found | None:  # fmt: skip
    """Loss and gradients of all rows, or None where the chunks' code has to serve: also where many targets are
    ignored.

    Args:
        upstream: the gradients of the rows' losses, 1 where there is none, of lse and of entropy.
        logits: of every row, where they are known. A gradient is written over them.
    """
    if not _serves(layer, call):
        return None
    x, weight, _ = layer
    loss, (total, mean, keep, extras, needs) = call.loss, wanted
    if logits is None and onednn.onednn_serves_rows(x, weight):
        # Else these logits would be thrown away.
        if _counts(x, call.target, loss.ignore_index, len(weight)) < 0:
            return None
        logits = onednn.onednn_outputs(x, weight)
    served, row_losses, lse, *others = linear_rows(
        x, weight, call.target, logits, *(upstream or LossGradients()), loss.ignore_index,
        call.chunking.skip_ignored, loss.label_smoothing, loss.softcap or 0.0, loss.logit_scale, loss.z_loss, total,
        mean, keep, *extras, *needs,
    )  # fmt: skip
    if not served:
        return None
    if logits is not None:
        others[2] = logits
    asked = *extras, keep, *needs
    return Found(row_losses, lse, *(t if want else None for t, want in zip(others, asked, strict=True)))
