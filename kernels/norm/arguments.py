"""What the norms' kernels take: small NamedTuples of pointers, places and numbers, made once a call.

A kernel tests a pointer that may be absent by ``is not None``, which the compiler decides. So dropout is on where
there is a seed, and a gradient is computed where there is a tensor for it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import RowView
from ..math import is_kept, starts


class NormInputs(NamedTuple):
    """``seed``, a key and the number of the first row, is for the dropout of ``x`` before ``residual`` is added."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    seed: torch.Tensor | None


class NormOutputs(NamedTuple):
    y: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


class NormPlaces(NamedTuple):
    """Where rows begin, each as :attr:`..launch.RowView.layout`."""

    x: tuple[int, int, int]
    residual: tuple[int, int, int]


class BranchDropout(NamedTuple):
    """An element is kept where its random word is at least ``threshold``; the kept ones are scaled by ``scale``."""

    threshold: int
    scale: float


class NormNumbers(NamedTuple):
    eps: float
    offset: float
    dropout: BranchDropout


class NormForwardPass(NamedTuple):
    """What every launcher of the forward takes."""

    inputs: NormInputs
    outputs: NormOutputs
    places: NormPlaces
    n_rows: int
    n_cols: int
    numbers: NormNumbers
    center: bool


class NormGradInputs(NamedTuple):
    dy: torch.Tensor
    dh: torch.Tensor | None
    x: torch.Tensor
    weight: torch.Tensor | None
    seed: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor


class NormGradOutputs(NamedTuple):
    """``dweight`` and ``dbias`` are fp32, a row of partial sums for each program."""

    dinput: torch.Tensor | None
    dresidual: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


class NormGradPlaces(NamedTuple):
    """Where rows begin, each as :attr:`..launch.RowView.layout`."""

    dy: tuple[int, int, int]
    dh: tuple[int, int, int]
    x: tuple[int, int, int]


class NormBackwardPass(NamedTuple):
    """What every launcher of the backward takes."""

    inputs: NormGradInputs
    outputs: NormGradOutputs
    places: NormGradPlaces
    n_rows: int
    n_cols: int
    offset: float
    dropout: BranchDropout
    center: bool


def _branch_dropout(p: float) -> BranchDropout:
    return BranchDropout(int(p * 2**32), 1.0 / (1.0 - p))


def forward_pass(call, outputs: NormOutputs) -> NormForwardPass:
    """``call``: the operands of the operator norm_fwd."""
    n_cols = call.x.shape[-1]
    x = RowView(call.x, n_cols)
    residual = x if call.residual is None else RowView(call.residual, n_cols)
    return NormForwardPass(
        NormInputs(x.data, None if call.residual is None else residual.data, call.weight, call.bias, call.seed),
        outputs,
        NormPlaces(x.layout, residual.layout),
        x.count,
        n_cols,
        NormNumbers(call.eps, call.offset, _branch_dropout(call.dropout_p)),
        call.center,
    )


def backward_pass(call, outputs: NormGradOutputs) -> NormBackwardPass:
    """``call``: the operands of the operator norm_bwd."""
    n_cols = call.x.shape[-1]
    dy, x = RowView(call.dy, n_cols), RowView(call.x, n_cols)
    dh = dy if call.dh is None else RowView(call.dh, n_cols)
    return NormBackwardPass(
        NormGradInputs(
            dy.data, None if call.dh is None else dh.data, x.data, call.weight, call.seed, call.mean, call.rstd
        ),
        outputs,
        NormGradPlaces(dy.layout, dh.layout, x.layout),
        x.count,
        n_cols,
        call.offset,
        _branch_dropout(call.dropout_p),
        call.center,
    )


def tile_warps(elements: int, most: int = 16) -> int:
    """Warps for a tile: 16 elements a thread."""
    return max(1, min(most, elements // 512))


@triton.jit
def row_starts(rows, place):
    return starts(rows, place[0], place[1], place[2])


@triton.jit
def drop_branch(x, key, rows, start, dropout, COLS: tl.constexpr):
    """Dropout of ``x``, the columns from ``start`` on of ``rows``, counted from the seed's first row."""
    high = (rows >> 32).to(tl.uint32)[:, None]
    kept = is_kept(key, rows.to(tl.uint32), high, start, dropout.threshold, COLS)
    return tl.where(kept, x * dropout.scale, 0.0)
