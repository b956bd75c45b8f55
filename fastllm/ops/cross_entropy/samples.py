"""Samples of cross_entropy and linear_cross_entropy, and the least that such calls move and compute."""

from __future__ import annotations

import math

import torch

from ...registry import Cost, Sample
from .loss import class_dim


def cross_entropy_samples(device, dtype):
    def make(*shape, scale=2.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def classes(n_classes, *shape, ignored=0.25):
        index = torch.randint(0, n_classes, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < ignored, -100, index)

    def probabilities(*shape, dim=1):
        return torch.softmax(torch.randn(shape, device=device), dim).to(dtype).requires_grad_()

    def weights(n_classes):
        return torch.rand(n_classes, device=device).add_(0.5).to(dtype)

    def masked(*shape):
        x = torch.randn(shape, device=device)
        x[:, : shape[1] // 2] = -math.inf
        return x.to(dtype).requires_grad_()

    every = dict(label_smoothing=0.1, softcap=5.0, logit_scale=0.7, z_loss=0.05, return_lse=True)
    yield Sample("mean", (make(7, 63), classes(63, 7)))
    yield Sample("none_lse", (make(5, 100), classes(100, 5)), dict(reduction="none", return_lse=True))
    yield Sample("every_option", (make(9, 37), classes(37, 9), weights(37)), dict(every, reduction="sum"))
    yield Sample("one_class", (make(4, 1), classes(1, 4)), dict(reduction="none", label_smoothing=0.2))
    yield Sample("unbatched", (make(65), torch.tensor(3, device=device)))
    yield Sample("no_rows", (make(0, 8), classes(8, 0)), dict(reduction="sum"))
    yield Sample("all_ignored", (make(3, 8), classes(8, 3, ignored=1.0)))
    yield Sample("wide", (make(3, 9001), classes(9001, 3)), dict(softcap=3.0))
    yield Sample("images", (make(2, 5, 3, 7), classes(5, 2, 3, 7), weights(5)), dict(label_smoothing=0.3))
    yield Sample("classes_last", (make(2, 9, 6).transpose(1, 2), classes(6, 2, 9)), dict(reduction="none"))
    yield Sample("row_stride", (make(6, 64)[:, 5:38], classes(33, 6)), dict(z_loss=0.1))
    yield Sample("transposed", (make(70, 6).t(), classes(70, 6)), dict(label_smoothing=0.1))
    yield Sample("expanded", (make(1, 20).expand(4, 20), classes(20, 4)), dict(logit_scale=3.0))
    yield Sample("masked_logits", (masked(3, 40), torch.full((3,), 30, device=device)), dict(z_loss=0.01))
    yield Sample("large_logits", (make(4, 50, scale=300.0), classes(50, 4)))
    yield Sample("probabilities", (make(4, 51), probabilities(4, 51)), dict(label_smoothing=0.1))
    yield Sample(
        "probabilities_every",
        (make(3, 11, 4), probabilities(3, 11, 4), weights(11)),
        dict(every, reduction="none"),
    )
    yield Sample("probabilities_alone", (make(3, 30).detach(), probabilities(3, 30)), dict(reduction="sum"))


def cross_entropy_cost(input, target, *args, **options) -> Cost:
    """Logits in, nothing of their size out; backward: logits in, their gradient out. Probabilities the same."""
    logits = input.numel() * input.element_size()
    targets = target.numel() * target.element_size()
    gradient = targets if target.is_floating_point() and target.requires_grad else 0
    rows = input.numel() // max(input.shape[class_dim(input)], 1)
    return Cost(logits + targets + 20 * rows, 2 * logits + targets + gradient + 16 * rows)


def linear_cross_entropy_samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def classes(n, *shape, ignored=0.25):
        y = torch.randint(0, n, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < ignored, -100, y)

    tiny = 1e-4  # MiB: a few rows at a time
    yield Sample("mean", (make(7, 16), make(50, 16, scale=0.3), classes(50, 7)))
    yield Sample(
        "bias_in_chunks", (make(9, 8), make(33, 8), classes(33, 9)), dict(linear_bias=make(33), max_workspace_mb=tiny)
    )
    yield Sample(
        "every_option",
        (make(2, 5, 8), make(21, 8), classes(21, 2, 5)),
        dict(
            linear_bias=make(21), weight=torch.rand(21, device=device).to(dtype), label_smoothing=0.1, softcap=4.0,
            logit_scale=0.7, z_loss=0.05, token_weight=torch.rand(2, 5, device=device), shift=1, return_lse=True,
            max_workspace_mb=tiny,
        ),
    )  # fmt: skip
    yield Sample(
        "accuracy_and_entropy",
        (make(7, 8), make(21, 8), classes(21, 7)),
        dict(return_accuracy=True, return_entropy=True, logit_scale=0.5, softcap=5.0, max_workspace_mb=tiny),
    )
    yield Sample("few_targets", (make(9, 8), make(21, 8), classes(21, 9, ignored=0.6)), dict(max_targets=8))
    yield Sample("none", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="none", max_workspace_mb=tiny))
    yield Sample("sum_recomputed", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="sum", recompute=True))
    yield Sample("frozen_body", (make(6, 8).detach(), make(21, 8), classes(21, 6)), dict(z_loss=0.1))
    yield Sample("frozen_head", (make(6, 8), make(21, 8).detach(), classes(21, 6)), dict(label_smoothing=0.2))
    yield Sample("no_rows", (make(0, 8), make(21, 8), classes(21, 0)), dict(reduction="sum"))
    yield Sample("strided", (make(8, 6).t(), make(8, 21).t(), classes(21, 6)), dict(reduction="sum"))
    yield Sample("all_ignored", (make(3, 8), make(21, 8), torch.full((3,), -100, device=device)))


def linear_cross_entropy_cost(input, linear_weight, target, *, linear_bias=None, **options) -> Cost:
    """Input, weight and targets in; backward: their gradients out. Three matrix multiplications."""
    moved = sum(t.numel() * t.element_size() for t in (input, linear_weight, linear_bias) if t is not None)
    matmul = 2 * target.numel() * linear_weight.numel()
    wanted = sum(t.requires_grad for t in (input, linear_weight))
    return Cost(moved + 8 * target.numel(), moved, matmul, wanted * matmul)
