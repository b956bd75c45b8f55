"""linear_cross_entropy's computation: the logits of some rows at a time, never of all."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..shared.autograd import without_autocast
from .call import Chunking
from .loss import LOSS_SCHEMA, Labelled, Loss
from .operator import LossGradients
from .products import Layer, LayerGradients, logits_into
from .rows import ROW_LOSSES, Extras

# MiB of a chunk's logits by default. Guesses; on CUDA 2,400 rows of 256,000 classes in 16 bits.
DEFAULT_WORKSPACE_MB = {"cuda": 1200.0, "cpu": 64.0}
# From so many rows on, a chunk on CUDA may take twice as much. Each chunk but the first reads and writes the fp32 sum
# of dW: with bfloat16 of 16384 x 4096 x 128256 two chunks move 8.4 GB less than four, 2 of about 82 ms (modelled).
MANY_ROWS = 16384
# On a CPU a chunk may take more than the default up to so many rows, where they take no more bytes than the weight:
# calls of so few rows are one chunk, whose logits the backward of row losses need not compute again. For 512 rows of
# 512 x 50304 in float32 at AVX2 that takes 0.76 of the time of two chunks (docs/post-training.md).
WHOLE_ROWS = 1024
# Rows of a tile of a GPU's matmuls. A guess.
TILE = 128


class LayerLoss(NamedTuple):
    """The loss of the layer's outputs (N, V), and how it is computed. ``op``: which function messages name."""

    target: torch.Tensor
    weight: torch.Tensor | None
    token_weight: torch.Tensor | None
    loss: Loss
    chunking: Chunking
    backend: str
    op: str

    def flat(self) -> tuple:
        """The arguments of an operator, in the order of :data:`LAYER_LOSS_SCHEMA`."""
        return *self[:3], *self.loss, *self.chunking, self.backend, self.op

    def without_tensors(self) -> LayerLoss:
        """What a node keeps: its tensors are saved beside the others."""
        return self._replace(target=None, weight=None, token_weight=None)

    @staticmethod
    def of(args: tuple) -> tuple[LayerLoss, tuple]:
        """What begins an operator's arguments, and the rest of them."""
        loss = 3 + len(Loss._fields)
        chunking = loss + len(Chunking._fields)
        target, weight, token_weight = args[:3]
        how = Loss(*args[3:loss]), Chunking(*args[loss:chunking])
        backend, op = args[chunking : chunking + 2]
        return LayerLoss(target, weight, token_weight, *how, backend, op), args[chunking + 2 :]


LAYER_LOSS_SCHEMA = (
    f"Tensor target, Tensor? class_weight, Tensor? token_weight, {LOSS_SCHEMA},"
    " float? max_workspace_mb, int? max_targets, bool skip_ignored, bool for_entropy, str backend, str op"
)


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """How a call will run: ``rows`` of logits at a time in ``chunks`` turns, ``workspace_bytes`` beside the gradients.

    ``lane`` says what the gradients cost: "3 matmuls, no recompute" computes them with the loss; "4 matmuls, recompute"
    keeps nothing and computes the logits again in the backward; one less each where the layer or its input is frozen;
    "1 matmul, loss only" where nothing needs a gradient.
    """

    rows: int
    chunks: int
    workspace_bytes: int
    lane: str

    def __str__(self):
        mib = self.workspace_bytes / 2**20
        return f"{self.chunks} chunks of {self.rows} rows, {mib:.1f} MiB of workspace, {self.lane}"


def keeps_wide(dtype: torch.dtype, backend: str) -> bool:
    """Whether a chunk's logits are held once more in fp32: the eager path does so for 16-bit inputs."""
    return backend == "eager" and torch.promote_types(dtype, torch.float32) != dtype


def bytes_per_row(n_classes: int, dtype: torch.dtype, backend: str, capped: bool, entropy: bool) -> int:
    """The workspace of one row: its logits; by eager also the soft cap's slope and the terms that entropy sums."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    beside = keeps_wide(dtype, backend) + (capped + entropy if backend == "eager" else 0)
    return n_classes * (dtype.itemsize + beside * wide)


def chunk_plan(tokens: int, row_bytes: int, workspace_mb: float) -> LinearCrossEntropyPlan:
    """As many rows at a time as the workspace holds, all chunks of one size."""
    rows = max(1, min(int(workspace_mb * 2**20 // row_bytes), tokens))
    if TILE <= rows < tokens:
        rows -= rows % TILE  # whole tiles of the matmuls
    chunks = math.ceil(tokens / rows) if tokens else 0
    rows = math.ceil(tokens / chunks) if chunks else rows  # as many chunks, of one size
    return LinearCrossEntropyPlan(rows, chunks, rows * row_bytes, "")


def default_workspace_mb(device_type: str, rows: int) -> float:
    """MiB for a chunk of a call on ``rows`` rows where the caller gives none; of few rows, a CPU's may take more."""
    default = DEFAULT_WORKSPACE_MB.get(device_type, DEFAULT_WORKSPACE_MB["cpu"])
    return 2 * default if device_type == "cuda" and rows >= MANY_ROWS else default


def workspace_mb(chunking: Chunking, weight: torch.Tensor, rows: int, row_bytes: int) -> float:
    """MiB for a chunk of a call on ``rows`` rows of ``row_bytes``: what the caller gave, else the device's default."""
    if chunking.max_workspace_mb:
        return chunking.max_workspace_mb
    device_type = weight.device.type
    default = default_workspace_mb(device_type, rows)
    if device_type == "cuda":
        return default
    return max(default, min(WHOLE_ROWS * row_bytes, weight.numel() * weight.element_size()) / 2**20)


def rows_to_compute(y, ignore_index: int, chunking: Chunking):
    """The rows whose loss is computed, or None for all. With ``max_targets`` on CUDA, ignored ones may be among them.

    ValueError on CPU where more targets count than ``max_targets``; on CUDA a device-side assert.
    """
    if not chunking.skip_ignored:
        return None
    keep, most = y != ignore_index, chunking.max_targets
    if most is not None and y.is_cuda:
        # The host does not wait to learn which rows they are: a stable sort puts them first.
        torch.ops.aten._assert_async.msg(
            keep.sum() <= most, "linear_cross_entropy: more targets count than max_targets"
        )
        return torch.argsort((~keep).to(torch.uint8), stable=True)[:most]
    index = keep.nonzero().squeeze(1)
    if most is not None and len(index) > most:
        raise ValueError(f"linear_cross_entropy: {len(index)} targets count, more than max_targets {most}")
    return None if len(index) == len(y) and not y.is_cuda else index


class KeptLogits(NamedTuple):
    """Room for the logits (N, V) of all rows where one chunk is all; those that are computed stand first.

    ``known``: they are there already.
    """

    logits: torch.Tensor
    known: bool = True

    @staticmethod
    def of(layer: Layer, call: LayerLoss) -> KeptLogits | None:
        """Where a forward that writes no gradient leaves them, or None where they are more than one chunk.

        The extension alone leaves logits as they are.
        """
        count = len(layer.x)
        if call.backend != "native" or not 0 < count <= rows_at_once(layer, call):
            return None
        return KeptLogits(layer.x.new_empty(count, len(layer.weight)), known=False)


def rows_at_once(layer: Layer, call: LayerLoss) -> int:
    """How many rows' logits the workspace holds."""
    return chunk_plan(*_room(layer, call)).rows


def is_one_chunk(layer: Layer, call: LayerLoss) -> bool:
    """Whether the workspace holds the logits of all rows, of which there are some."""
    most, row_bytes, workspace = _room(layer, call)
    return 0 < len(layer.x) == most and most * row_bytes <= workspace * 2**20


def _room(layer: Layer, call: LayerLoss) -> tuple[int, int, float]:
    """(the most rows that are computed, the bytes of each, MiB of workspace)."""
    x, weight, _ = layer
    # Planned for the most rows that may be computed: on CUDA the host does not know the number.
    most = len(x) if call.chunking.max_targets is None else min(len(x), call.chunking.max_targets)
    capped = call.loss.softcap is not None
    row_bytes = bytes_per_row(len(weight), x.dtype, call.backend, capped, call.chunking.for_entropy)
    return most, row_bytes, workspace_mb(call.chunking, weight, most, row_bytes)


def in_chunks(
    layer: Layer, call: LayerLoss, upstream: LossGradients, needs, wanted: Extras, kept: KeptLogits | None = None
):
    """(loss, lse, accuracy, entropy, dx, dlinear_weight, dlinear_bias), a chunk of logits at a time.

    The first four are (N,) in at least fp32; accuracy and entropy None where not ``wanted``. Gradients only where
    ``upstream`` has one for the rows' losses and ``needs`` asks, else None; :class:`.products.LayerGradients` says in
    what dtype they come. A row that is left out has 0 in all of them, lse included. ``kept``: the only chunk's logits,
    in place of a workspace; a gradient is written over them.
    """
    x, linear_weight, linear_bias = layer
    n, n_classes = x.shape[0], linear_weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    index = rows_to_compute(call.target, call.loss.ignore_index, call.chunking)
    count = n if index is None else len(index)
    needs = needs if upstream.loss is not None else (False, False, False)
    chunk = rows_at_once(layer, call)
    parts = []
    gradients = LayerGradients.of(layer, needs, call.backend, math.ceil(count / chunk), index is None)
    logits = x.new_empty(min(chunk, count), n_classes) if kept is None else kept.logits
    whole = index is None and count <= chunk  # no slices then, which take 0.1 ms between products
    held = logits.to(wide) if keeps_wide(x.dtype, call.backend) else logits
    row_losses = ROW_LOSSES[call.backend]
    # Autocast would narrow the fp32 sums again.
    with without_autocast(x.device.type):
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            at = slice(start, stop) if index is None else index[start:stop]
            if whole:
                xc, z, mine, target, of_chunk = x, logits, held, call.target, upstream
            else:
                xc, z, mine = x[at], logits[: stop - start], held[: stop - start]
                target, of_chunk = call.target[at], upstream.of(at)
            if kept is None or not kept.known:
                logits_into(xc, linear_weight, linear_bias, z)
            if mine.dtype != z.dtype:
                mine.copy_(z)
            labelled = Labelled(mine, target, call.weight, call.loss)
            parts.append((at, row_losses(labelled, of_chunk, wanted)))
            gradients.add(at, xc, mine, z)
    if index is None and len(parts) == 1:
        loss, lse, accuracy, entropy = parts[0][1]
    else:
        zeros = functools.partial(torch.zeros, n, dtype=wide, device=x.device)
        loss, lse = zeros(), zeros()
        accuracy, entropy = zeros() if wanted.accuracy else None, zeros() if wanted.entropy else None
        for at, rows in parts:
            for of_all, of_rows in zip((loss, lse, accuracy, entropy), rows, strict=True):
                if of_all is not None:
                    of_all[at] = of_rows
    return loss, lse, accuracy, entropy, gradients.x, gradients.weight, gradients.bias
