"""What the attention kernels take: values that a launcher makes once for a call, and values made in a kernel.

What a call does not have is None in them, and its code is not compiled. Triton 3.6 sets limits. It turns the constants
that a device function returns into tensors, so no device function returns None. It cannot compare a value with None
that has a None inside. In a loop it may lose a constant, such as a stride of 1, of a value within a value, so a value
that a loop reads is flat. It passes no string to a device function: that takes the constant value around it.
"""

from typing import NamedTuple

import torch
import triton.language as tl


class Plane(NamedTuple):
    """A tensor of planes (batch, head) of rows: its pointer, and its strides in elements."""

    ptr: torch.Tensor
    batch: int
    head: int
    row: int
    col: int


class ScoreStatistics(NamedTuple):
    """fp32 tensors of one number for each query row, (B, H, Sq) or packed (H, total), all of these two strides."""

    row_max: torch.Tensor
    row_log2: torch.Tensor
    batch: int
    head: int
    lse: torch.Tensor | None = None
    delta: torch.Tensor | None = None


class Score(NamedTuple):
    """How a score comes from a dot product. The slopes and the bias have their strides beside them."""

    scale: float
    unit: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    slopes: torch.Tensor | None = None
    slopes_batch: int | None = None
    slopes_head: int | None = None
    bias: torch.Tensor | None = None
    bias_batch: int | None = None
    bias_head: int | None = None
    bias_row: int | None = None
    bias_col: int | None = None


class WeightDropout(NamedTuple):
    """A weight is kept where its 32 random bits are at least ``threshold``; the kept ones are scaled.

    ``seed`` (2,): Philox's key, and the number of the first plane of scores.
    """

    seed: torch.Tensor
    threshold: int
    keep_scale: float


class CallSizes(NamedTuple):
    """The numbers of a call. ``rows`` and ``cols`` are the totals of packed sequences, which have cu_q and cu_k."""

    sequences: int
    heads: int
    group: int
    rows: int
    cols: int
    dim: int
    dim_v: int
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None


class Programs(NamedTuple):
    """How a grid is split: the tiles of one sequence, and the programs of one head over all sequences."""

    tiles: int
    per_head: int


class KernelFlags(NamedTuple):
    """Constants of a kernel. ``mask``: the bias is boolean, True for what takes part.

    ``align`` elements divide every stride and head dim; 1 where that is not known.
    """

    natural: bool
    mask: bool
    bottom_right: bool
    exact: bool
    precision: str
    align: int


class TileShape(NamedTuple):
    """Constants of a kernel: query rows, keys, and the padded head dims of q and k, and of v."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int


class Matrix(NamedTuple):
    """In a kernel: the rows of one plane from a sequence's start on, and the indices of their ``dim`` columns."""

    ptr: tl.tensor
    row: tl.tensor
    col: tl.tensor
    columns: tl.tensor
    dim: tl.tensor
    batch: tl.tensor
    head: tl.tensor


class Sheet(NamedTuple):
    """In a kernel: the scores (n_rows, n_cols) of one head of one sequence; ``number`` is its plane's for dropout.

    ``bias`` points at the bias of the score (0, 0). It, ``slope`` and dropout's ``seed`` are 0 where the call has none.
    """

    n_rows: tl.tensor
    n_cols: tl.tensor
    offset: tl.tensor
    number: tl.tensor
    slope: tl.tensor
    bias: tl.tensor
    seed: tl.tensor
