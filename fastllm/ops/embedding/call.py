"""A call of embedding as one value, and the checks that it shares with embedding_sum."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..shared.check import check_dense, check_integer, check_number


class EmbeddingCall(NamedTuple):
    """A call of the op."""

    input: torch.Tensor
    weight: torch.Tensor
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    by_freq: bool
    sparse: bool
    main_grad: torch.Tensor | None
    vocab_range: tuple[int, int] | None

    def tensors(self):
        return (self.weight,)


def check_table(op: str, name: str, weight) -> None:
    """``weight`` is a table: (rows, columns)."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    check_dense(op, name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape (rows, columns), got {list(weight.shape)}")


def check_indices(op: str, name: str, indices, weight: torch.Tensor, *, nested: bool = False) -> None:
    """``indices`` are ids for a lookup in ``weight``. ``nested``: they may be of several lengths."""
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {str(indices.dtype).removeprefix('torch.')}")
    if not (nested and indices.is_nested):
        check_dense(op, name, indices)
    if indices.device != weight.device:
        raise ValueError(f"{op}: {name} is on {indices.device}, the table on {weight.device}; they must be together")


def normalised_padding(op: str, padding_idx: int | None, rows: int, *, partial: bool = False) -> int:
    """``padding_idx`` as an id, negative ones counted from the end of a whole table; -1 for None."""
    if padding_idx is None:
        return -1
    check_integer(op, "padding_idx", padding_idx)
    if partial:
        if padding_idx < 0:
            raise ValueError(
                f"{op}: beside vocab_range padding_idx is an id of the whole vocabulary, got {padding_idx}"
            )
        return padding_idx
    if not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx must lie within a table of {rows} rows, got {padding_idx}")
    return padding_idx + rows if padding_idx < 0 else padding_idx


def _check_main_grad(main_grad, weight):
    if not isinstance(main_grad, torch.Tensor):
        raise TypeError(f"embedding: main_grad must be a tensor, got {type(main_grad).__name__}")
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"embedding: main_grad must have the table's shape {list(weight.shape)} on {weight.device}, "
            f"got {list(main_grad.shape)} on {main_grad.device}"
        )
    if main_grad.dtype not in (weight.dtype, torch.float32) or weight.dtype == torch.float64 != main_grad.dtype:
        raise ValueError(
            f"embedding: main_grad must be {weight.dtype} or, beside 16 bits, float32; got {main_grad.dtype}"
        )
    if main_grad.shape[1] > 1 and main_grad.stride(1) != 1:
        raise ValueError(f"embedding: main_grad's columns must be contiguous, got strides {list(main_grad.stride())}")
    if main_grad.shape[0] > 1 and main_grad.stride(0) < main_grad.shape[1]:
        raise ValueError(f"embedding: main_grad's rows must not overlap, got strides {list(main_grad.stride())}")
    if torch.compiler.is_compiling():
        raise ValueError("embedding: main_grad is changed in backward, which torch.compile cannot trace; leave it out")


def embedding_call(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False, *,
    main_grad=None, vocab_range=None,
) -> EmbeddingCall:  # fmt: skip
    """The arguments of :func:`fastllm.functional.embedding`, checked, as one value."""
    check_table("embedding", "weight", weight)
    # PyTorch's operator serves ids of several lengths, without what is ours.
    check_indices("embedding", "input", input, weight, nested=main_grad is None and vocab_range is None)
    num_rows = weight.shape[0]
    normalised_padding("embedding", padding_idx, num_rows, partial=vocab_range is not None)
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if value is not None or name == "norm_type":
            check_number("embedding", name, value)
    if vocab_range is not None:
        if not isinstance(vocab_range, tuple | list) or len(vocab_range) != 2:
            raise TypeError(f"embedding: vocab_range must be a pair (start, end), got {vocab_range!r}")
        start, end = vocab_range
        for bound in (start, end):
            check_integer("embedding", "vocab_range", bound)
        vocab_range = (start, end)
        if start < 0 or end - start != num_rows:
            raise ValueError(f"embedding: vocab_range {(start, end)} does not fit a table of {num_rows} rows")
        if max_norm is not None or sparse:
            raise ValueError("embedding: vocab_range goes with neither max_norm nor sparse")
    if main_grad is not None:
        _check_main_grad(main_grad, weight)
        if sparse:
            raise ValueError("embedding: main_grad does not go with sparse")
    return EmbeddingCall(
        input, weight, padding_idx=padding_idx, max_norm=max_norm, norm_type=norm_type,
        by_freq=scale_grad_by_freq, sparse=sparse, main_grad=main_grad, vocab_range=vocab_range,
    )  # fmt: skip
