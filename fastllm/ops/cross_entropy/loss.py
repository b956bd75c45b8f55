"""What the cross-entropies share: checks, dtypes, the transform of the logits, samples."""

from __future__ import annotations

import math

import torch

from ...registry import Sample
from ..shared.autograd import autocasts
from ..shared.check import check_floating, check_integer

REDUCTIONS = ("none", "mean", "sum")


def class_dim(input: torch.Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def legacy(size_average, reduce, reduction: str) -> str:
    """``reduction``, or what torch's deprecated flags ask for (with torch's warning)."""
    if size_average is None and reduce is None:
        return reduction
    return torch.nn._reduction.legacy_get_string(size_average, reduce)


def loss_dtype(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.dtype:
    """torch's dtype of the loss: the input's, widened by floating targets and their weights; under autocast fp32."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    if autocasts(input.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


def transformed(input: torch.Tensor, softcap, logit_scale: float) -> torch.Tensor:
    """The logits that the loss is taken of, in at least fp32."""
    z = input.to(torch.promote_types(input.dtype, torch.float32))
    if logit_scale != 1.0:
        z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def out_of_range(
    target: torch.Tensor, ignore_index: int, n_classes: int, op: str = "cross_entropy"
) -> IndexError | None:
    """An error that names the first target that is no class, or None."""
    if target.numel() > 0:
        least, most = target.aminmax()  # one pass, and enough where nothing is ignored
        if least >= 0 and most < n_classes:
            return None
    bad = (target != ignore_index) & ((target < 0) | (target >= n_classes))
    if not bad.any():
        return None
    position = bad.nonzero()[0].tolist()
    return IndexError(
        f"{op}: target {target[tuple(position)].item()} at position {position} is out of range: expected "
        f"a class in [0, {n_classes}) or ignore_index {ignore_index}"
    )


def check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss):
    op = "cross_entropy"
    if not isinstance(input, torch.Tensor) or not input.is_floating_point():
        got = str(input.dtype) if isinstance(input, torch.Tensor) else type(input).__name__
        raise TypeError(f"{op}: input must be a floating-point tensor of logits, got {got}")
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    if input.dim() == 0:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, d1, ...), got a scalar")
    n_classes = input.shape[class_dim(input)]
    positions = input.shape[:0] if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"{op}: a target of the input's shape {list(input.shape)} holds class probabilities and must be "
                f"floating point, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index is for class indices, got {ignore_index} with class probabilities")
    elif tuple(target.shape) != tuple(positions) and not (input.dim() == 1 and tuple(target.shape) == (1,)):
        raise ValueError(
            f"{op}: for input of shape {list(input.shape)} target must be class indices of shape {list(positions)} or "
            f"class probabilities of the input's shape, got shape {list(target.shape)}"
        )
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{op}: class indices must be int64 (or uint8), got {target.dtype}")
    check_integer(op, "ignore_index", ignore_index)
    if target.device != input.device:
        raise ValueError(f"{op}: target is on {target.device}, input on {input.device}; they must be together")
    check_options(op, input, weight, n_classes, reduction, label_smoothing, softcap, logit_scale, z_loss)


def check_options(op, input, weight, n_classes, reduction, label_smoothing, softcap, logit_scale, z_loss):
    """The options that every cross-entropy has."""
    if weight is not None:
        check_floating(op, "weight", weight)
        if tuple(weight.shape) != (n_classes,):
            raise ValueError(f"{op}: weight must have one element per class, [{n_classes}], got {list(weight.shape)}")
        if weight.device != input.device:
            raise ValueError(f"{op}: weight is on {weight.device}, input on {input.device}; they must be together")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not (0.0 < softcap < math.inf):
        raise ValueError(f"{op}: softcap must be positive and finite, or None; got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{op}: logit_scale must be finite, got {logit_scale}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be finite and not negative, got {z_loss}")


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
