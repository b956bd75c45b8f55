"""Rotary position embedding of queries and keys: every pair (a, b) of features turned by its position's angle.

    a' = a cos - b sin,   b' = b cos + a sin

Pairs are (i, i + half), or (2 i, 2 i + 1) where interleaved; features past 2 half are copied. A program takes the
cosines and sines of some positions into registers and then the rows of one head after another, queries and keys alike,
so that every tensor is read or written once. The gradient is the same with the angles' sign turned.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch_options, next_power_of_2, tuned
from .math import block_count

# Features of a head's rows that a program holds: 16 for each thread of 4 warps, as two loads of 16 bytes. From compiled
# register counts, not timings.
TILE = 2048
# Programs to aim for: where one for all heads of some positions gives fewer, the heads are divided. A guess.
PROGRAMS = 1024


@triton.jit
def _turn(
    x_ptr, y_ptr, x_at, y_at, in_rows, cos, sin, half: tl.constexpr, rest: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The rows at ``x_at`` to ``y_at``, both (BLOCK_M,); cos and sin (BLOCK_M, HALF)."""
    x_ptr += x_at[:, None]
    y_ptr += y_at[:, None]
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)[None, :]
        mask = in_rows[:, None] & (cols < 2 * half)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (x.shape[0], 2 * HALF))
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        cols = tl.arange(0, HALF)[None, :]
        mask = in_rows[:, None] & (cols < half)
        a = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + half + cols, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        cols = tl.arange(0, REST)[None, :]
        mask = in_rows[:, None] & (cols < rest)
        tl.store(y_ptr + 2 * half + cols, tl.load(x_ptr + 2 * half + cols, mask=mask), mask=mask)


@triton.jit
def _turn_heads(x, y, heads, batch, s, in_rows, cos, sin, half: tl.constexpr, rest: tl.constexpr, tile: tl.constexpr):
    """The heads from heads[0] until heads[1], or heads[2] if less, of ``x`` to ``y``, both a :class:`HeadPlanes`."""
    x_at, y_at = batch * x.batch + s * x.row, batch * y.batch + s * y.row
    for head in range(heads[0], tl.minimum(heads[1], heads[2])):
        h = tl.cast(head, tl.int64)
        _turn(
            x.ptr, y.ptr, x_at + h * x.head, y_at + h * y.head, in_rows, cos, sin, half, rest,
            tile.INTERLEAVED, tile.HALF, tile.REST,
        )  # fmt: skip


@triton.jit
def _rotary_kernel(
    query, key, query_out, key_out, cos_table, sin_table, ids, sizes, offset,
    half: tl.constexpr, rest: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``key`` and ``ids`` may be None."""
    blocks = block_count(sizes.length, tile.BLOCK_M)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks).to(tl.int64) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    in_rows = s < sizes.length
    if ids is not None:
        position = tl.load(ids.ptr + batch * ids.batch + s * ids.row, mask=in_rows, other=0).to(tl.int64)
    else:
        position = s + offset
    known = (position >= 0) & (position < sizes.table_rows)
    tl.device_assert(known | ~in_rows, "rotary_embedding: a position is not in [0, rows of cos)")
    cols = tl.arange(0, tile.HALF).to(tl.int64)[None, :]
    # Where asserts are compiled out, an unknown position shows as NaN.
    mask = known[:, None] & (cols < half)
    c_at = batch * cos_table.batch + position[:, None] * cos_table.row + cols * cos_table.col
    s_at = batch * sin_table.batch + position[:, None] * sin_table.row + cols * sin_table.col
    cos = tl.load(cos_table.ptr + c_at, mask=mask, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_table.ptr + s_at, mask=mask, other=float("nan")).to(tl.float32)
    if tile.INVERSE:
        sin = -sin
    first = tl.program_id(1) * sizes.heads_each
    last = first + sizes.heads_each
    heads = (first, last, sizes.heads_q)
    _turn_heads(query, query_out, heads, batch, s, in_rows, cos, sin, half, rest, tile)
    if key is not None:
        heads = (tl.maximum(first - sizes.heads_q, 0), last - sizes.heads_q, sizes.heads_k)
        _turn_heads(key, key_out, heads, batch, s, in_rows, cos, sin, half, rest, tile)


class HeadPlanes(NamedTuple):
    """A tensor (B, H, S, D) whose features are adjacent: its strides in elements."""

    ptr: torch.Tensor
    batch: int
    head: int
    row: int


class AngleTable(NamedTuple):
    """Cosines or sines (B, P, half), with their strides."""

    ptr: torch.Tensor
    batch: int
    row: int
    col: int


class PositionIds(NamedTuple):
    """Rows of the tables (B, S), with their strides."""

    ptr: torch.Tensor
    batch: int
    row: int


class RotarySizes(NamedTuple):
    length: int
    heads_q: int
    heads_k: int
    heads_each: int  # heads of a program, queries' before keys'
    table_rows: int


class RotaryTile(NamedTuple):
    """What is compiled in. HALF and REST are powers of 2 that hold the columns; REST is 0 where none are copied."""

    INVERSE: tl.constexpr
    INTERLEAVED: tl.constexpr
    BLOCK_M: tl.constexpr
    HALF: tl.constexpr
    REST: tl.constexpr


def rotary(call, query_out, key_out):
    """Write the rotated queries and keys of ``call`` to ``query_out`` and ``key_out``, whose features are adjacent.

    ``call`` has the fields of the op's call: query and key (B, H, S, D), any strides, where H may differ and key may be
    None; cos and sin, (P, half) or (B, P, half), any strides; position_ids, (S,) or (B, S) integers, the rows of the
    tables, or None for ``offset`` onwards; interleaved; and inverse, to turn the other way as the gradient does.
    """
    query, key, ids = call.query, call.key, call.position_ids
    keys = 0 if key is None else key.shape[1]
    if query.numel() + (0 if key is None else key.numel()) == 0:
        return
    batch, queries, length, width = query.shape
    heads = queries + keys
    half = call.cos.shape[-1]
    rest = width - 2 * half
    block_m = max(1, min(TILE // next_power_of_2(width), next_power_of_2(length), 32))
    settings = dict(BLOCK_M=block_m, num_warps=max(1, min(8, block_m * next_power_of_2(width) // 512)))
    settings = tuned("rotary", query.device, (block_m, next_power_of_2(width), query.element_size()), settings)
    block_m = settings["BLOCK_M"]
    blocks = batch * cdiv(length, block_m)
    groups = min(heads, max(1, cdiv(PROGRAMS, blocks)))
    heads_each = cdiv(heads, groups)
    sources = [None if t is None else t if t.stride(3) == 1 else t.contiguous() for t in (query, key)]
    tables = [t if t.dim() == 3 else t.expand(batch, *t.shape) for t in (call.cos, call.sin)]
    # Asserts are compiled in for ids alone; the integer arithmetic needs none of the overflow checks.
    asserts = dict(debug=True, sanitize_overflow=False) if query.is_cuda and ids is not None else {}
    _rotary_kernel[(blocks, cdiv(heads, heads_each))](
        *(None if key is None and i % 2 else HeadPlanes(t, *t.stride()[:3])
          for i, t in enumerate((*sources, query_out, key_out))),
        *(AngleTable(t, *t.stride()) for t in tables),
        None if ids is None else PositionIds(ids, *ids.expand(batch, length).stride()),
        RotarySizes(length, queries, keys, heads_each, call.cos.shape[-2]),
        call.offset,
        half=half,
        rest=rest,
        tile=RotaryTile(
            call.inverse, call.interleaved, block_m, next_power_of_2(half), next_power_of_2(rest) if rest else 0
        ),
        **launch_options(query.device, num_warps=settings["num_warps"], **asserts),
    )  # fmt: skip
