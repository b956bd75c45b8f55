"""Attention on a CPU in float32 by the extension (csrc/cpu/attention_rows.cpp), with every feature, both ways.

Tensors of 16 bits are widened a block at a time; products and sums are in float32. A forward's thread holds 384 rows of
one head, a backward's a whole head, and neither more than a block of scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import extension
from .call import AttentionCall, AttentionRequest, ForwardResult, OutputGradients, Wanted
from .eager import Sequence, each_sequence, if_given
from .forms import CHUNKS, TORCH, WIDENED, eager_form, has_gradient

# Work is heads * rows * columns * head dim. From this much on the extension serves a call that PyTorch's operator could
# serve too, under a causal edge and without one. PyTorch's time over the extension's, forward and backward in float32
# on one core of an AMD EPYC, at AVX2 and at AVX-512: causal, 8 heads of 128 x 64 (2^23) 1.30 and 1.28, 2 of 256 x 64
# (2^23) 1.28 and 1.57, one of 128 x 64 (2^20) 0.67 and 0.64; full, 4 of 256 x 64 (2^24) in a batch of 8 1.11 and 1.80,
# one of 512 x 64 (2^24) 0.97 and 1.35. The size of the batch is left out, so that the same backend serves a row in any
# batch.
MIN_CAUSAL_WORK, MIN_WORK = 2**22, 2**24
# With fewer rows of queries, packing the keys costs more than it saves. The same ratio for 12 full heads of 512
# columns: 1.01 and 1.45 with 64 rows, 0.69 and 1.36 with 16.
MIN_ROWS = 64
_TOO_SMALL = f"PyTorch's fused kernel is faster for fewer than {MIN_ROWS} queries and for small calls"
_UNMEASURED = "the extension is measured on CPUs with AVX2"
_UNITS = "in 16 bits PyTorch's fused kernel has this CPU's matrix units"

_rows = extension.operator("attention_rows", lambda *args: None)
_grad_rows = extension.operator("attention_grad_rows", lambda *args: None)


def native_loses(request: AttentionRequest) -> str | None:
    """Why eager serves a call on a CPU that the extension could take, where nobody asked for a backend; or None.

    The extension is 1.2 to 12 times as fast as eager's chunks of scores.
    """
    call = request.call
    form = eager_form(request)
    if form.name not in (TORCH, WIDENED, CHUNKS):
        return form.why
    if request.given is not None and call.dropout_p > 0 and form.name == TORCH:
        return form.why
    level = extension.cpu_level()
    if level == "baseline":
        return _UNMEASURED
    if form.name == CHUNKS:
        return None
    if level == "amx" and call.q.dtype != torch.float32 and form.name == TORCH:
        return _UNITS
    # In 16 bits on a CPU that multiplies them outside matrix units, PyTorch's backward is slow. One core of an AMD EPYC
    # (AVX-512, bfloat16), as many times as slow as the extension's: a batch of 128, 4 heads of 12 x 64 9.1, of 20 x 64
    # 6.0, of 32 x 64 4.2; one head of 20 x 64 1.9; 12 of 64 rows and 512 columns 1.9. Its forward took 0.35 of the
    # extension's time for one head of 20 x 64 (0.03 ms) and 1.0 to 1.4 in batches: without a gradient the lines hold.
    if call.q.dtype.itemsize == 2 and form.name == TORCH and any(map(has_gradient, (call.q, call.k, call.v))):
        return None
    return _TOO_SMALL if is_small(call.q.shape, call.k.shape[2], call.causal) else None


def is_small(shape: torch.Size, columns: int, causal: bool) -> bool:
    """Whether a query of ``shape`` (B, H, Sq, D) and so many keys are too few for the extension, in float32."""
    _, heads, rows, dim = shape
    work = heads * rows * columns * dim
    return work < MIN_CAUSAL_WORK if causal else rows < MIN_ROWS or work < MIN_WORK


class _Operands(NamedTuple):
    """The operands that both operators take."""

    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    numbers: tuple


def _operands(sequence: Sequence) -> _Operands:
    call = sequence.dense.call
    batch, heads, rows, _ = call.q.shape
    cols = call.k.shape[2]
    bias, slopes = call.bias, call.slopes
    if bias is not None:
        bias = (bias if bias.dtype == torch.bool else bias.float()).expand(batch, heads, rows, cols)
    if slopes is not None:
        slopes = slopes.float().expand(batch, heads)
    offset = cols - rows if call.bottom_right else 0
    numbers = (call.scale, call.softcap, call.left, call.right, offset, call.dropout_p, sequence.dense.first_plane)
    return _Operands(bias, slopes, numbers)


def native_attention_fwd(call: AttentionCall, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`fastllm.ops.attention.eager.eager_attention_fwd`, the statistics included."""
    q = call.q
    shape = (q.shape[1], q.shape[0]) if call.packed else q.shape[:3]
    lse = q.new_full(shape, -torch.inf, dtype=torch.float32)
    stats = q.new_zeros((2, *shape), dtype=torch.float32)
    stats[1] = torch.inf
    sinks = None if call.sinks is None else call.sinks.float().contiguous()
    for sequence in each_sequence(call):
        dense = sequence.dense.call
        bias, slopes, numbers = _operands(sequence)
        written = (sequence.of_q(out), *(sequence.of_row(x) for x in (lse, stats[0], stats[1])))
        _rows(dense.q, dense.k, dense.v, bias, sinks, slopes, call.seed, *written, *numbers)
    return lse, stats


def native_attention_bwd(
    call: AttentionCall, forward: ForwardResult, upstream: OutputGradients, wanted: Wanted
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As :func:`fastllm.ops.attention.eager.eager_attention_bwd`."""
    dbias = None
    if wanted.bias and call.bias is not None:
        dbias = call.bias.new_zeros(call.bias.shape, dtype=torch.float32)
    delta = torch.zeros_like(forward.stats[0])
    for sequence in each_sequence(call):
        dense = sequence.dense.call
        bias, slopes, numbers = _operands(sequence)
        of_planes = None
        if dbias is not None and dense.bias is not None:
            # One sum for each plane of scores, of the bias's rows and columns: several threads sum the planes.
            of_planes = delta.new_zeros(*dense.q.shape[:2], *dense.bias.shape[2:])
        _grad_rows(
            sequence.of_q(upstream.dout), if_given(sequence.of_row, upstream.dlse), sequence.of_q(forward.out),
            *(sequence.of_row(x) for x in forward.stats), dense.q, dense.k, dense.v, bias, slopes, call.seed,
            if_given(sequence.of_q, wanted.dq), if_given(sequence.of_k, wanted.dk), if_given(sequence.of_k, wanted.dv),
            None if of_planes is None else of_planes.expand(*dense.q.shape[:3], dense.k.shape[2]),
            sequence.of_row(delta), *numbers,
        )  # fmt: skip
        if dbias is not None and of_planes is not None:
            total = sequence.of_bias(dbias)
            total += of_planes.sum_to_size(total.shape)
    dsinks = None
    if wanted.sinks and call.sinks is not None:
        by_head = _dsinks(call.sinks, forward, delta)
        dsinks = (by_head if call.packed else by_head.sum(0)).to(call.sinks.dtype)
    return None if dbias is None or call.bias is None else dbias.to(call.bias.dtype), dsinks


def _dsinks(sinks: torch.Tensor, forward: ForwardResult, delta: torch.Tensor) -> torch.Tensor:
    """The gradient of the sinks, whose probabilities have no value to weigh, (..., heads) in float32."""
    most, log = forward.stats
    return (torch.exp(sinks.float().unsqueeze(-1) - most - log) * delta).sum(-1).neg()
