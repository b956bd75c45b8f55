"""Gated activations: y = act(gate) * up, with act one of silu, gelu and gelu_tanh, and its gradients.

    dup = dy * act(gate),   dgate = dy * up * act'(gate)

Every tensor is read or written once, in tiles. Tensors without gaps are taken as one long row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import RowView, cdiv, launch_options, next_power_of_2, tuned
from .math import block_count, starts

# Elements of a tile: 16 of each tensor to a thread of 4 warps. From compiled register counts, not yet from timings.
TILE = 2048
# Columns of a tile where there are several rows: a guess.
BLOCK_COLS = 1024


@triton.jit
def _sigmoids(x):
    """(sigmoid(x), sigmoid(-x)). Neither is 1 minus the other, which would cancel."""
    e = tl.exp(-tl.abs(x))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _act(g, KIND: tl.constexpr):
    """(act(g), act'(g)) in fp32."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif KIND == "gelu_tanh":
        # 0.5 (1 + tanh(v)) = sigmoid(2 v), which does not cancel for negative v; v = sqrt(2 / pi) (g + 0.044715 g^3).
        s, t = _sigmoids(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return g * s, s + g * s * t * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        s, t = _sigmoids(g)
        return g * s, s * (1.0 + g * t)


@triton.jit
def _tile(n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, mask) of this program's tile."""
    blocks = block_count(n_cols, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, cols, (rows < n_rows)[:, None] & (cols < n_cols)[None, :]


@triton.jit
def _places(rows, cols, layout):
    """Offsets of the tile's elements in a tensor of that :class:`.launch.RowLayout`."""
    return starts(rows, layout.inner, layout.outer_stride, layout.inner_stride)[:, None] + cols[None, :]


@triton.jit
def _gated_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_layout, up_layout, n_rows, n_cols,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _tile(n_rows, n_cols, BLOCK_M, BLOCK_N)
    gate_at = _places(rows, cols, gate_layout)
    up_at = _places(rows, cols, up_layout)
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
    value, _ = _act(gate, KIND)
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_layout, gate_layout, up_layout, stride_out, n_rows, n_cols,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A gradient that nobody wants has no pointer."""
    rows, cols, mask = _tile(n_rows, n_cols, BLOCK_M, BLOCK_N)
    dy_at = _places(rows, cols, dy_layout)
    gate_at = _places(rows, cols, gate_layout)
    out_at = rows[:, None] * stride_out + cols[None, :]
    dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32), KIND)
    if dup_ptr is not None:
        tl.store(dup_ptr + out_at, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)
    if dgate_ptr is not None:
        up_at = _places(rows, cols, up_layout)
        up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + out_at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)


class _Geometry(NamedTuple):
    """The tensors as rows, and how a kernel is launched over them."""

    views: list[RowView]
    n_rows: int
    n_cols: int
    grid: tuple[int]
    settings: dict


def _geometry(kernel: str, tensors, packed: bool) -> _Geometry:
    """Tensors without gaps are one long row, unless the gradient is ``packed`` and has gaps itself."""
    tensors = [t if t.dim() else t.unsqueeze(0) for t in tensors]
    n_cols = tensors[0].shape[-1]
    n_rows = tensors[0].numel() // n_cols
    if not packed and all(t.is_contiguous() for t in tensors):
        n_rows, n_cols = 1, tensors[0].numel()
    block_n = min(next_power_of_2(n_cols), TILE if n_rows == 1 else BLOCK_COLS)
    block_m = max(1, min(TILE // block_n, next_power_of_2(n_rows)))
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=max(1, block_m * block_n // 512))
    last = tensors[-1]
    settings = tuned(kernel, last.device, (block_m, block_n, last.element_size()), settings)
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, **launch_options(last.device, num_warps=settings["num_warps"]))
    grid = (cdiv(n_rows, block_m) * cdiv(n_cols, block_n),)
    return _Geometry([RowView(t, n_cols) for t in tensors], n_rows, n_cols, grid, tile)


def _halves(gate, up):
    return gate.chunk(2, -1) if up is None else (gate, up)


def gated_fwd(gate, up, kind: str):
    """act(gate) * up in the dtype that the two promote to; ``up`` None: ``gate`` holds both, along its last dimension.

    ``kind`` is "silu", "gelu" or "gelu_tanh".
    """
    gate, up = _halves(gate, up)
    y = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    if y.numel():
        (gates, ups), n_rows, n_cols, grid, settings = _geometry("gated_fwd", [gate, up], packed=False)
        _gated_fwd_kernel[grid](
            gates.data, ups.data, y, gates.layout, ups.layout, n_rows, n_cols, KIND=kind, **settings
        )
    return y


def gated_bwd(dy, gate, up, kind: str, needs):
    """(dgate, dup), as ``gate`` and ``up``; one that ``needs`` does not ask for is an empty tensor.

    Where ``up`` is None dgate holds both halves' gradients and dup is empty.
    """
    packed = up is None
    whole = gate
    gate, up = _halves(gate, up)
    need_dgate, need_dup = (needs[0], needs[0]) if packed else needs
    if packed:
        result = whole.new_empty(whole.shape), whole.new_empty(0)
        dgate, dup = result[0].chunk(2, -1)
    else:
        dgate, dup = result = (
            gate.new_empty(gate.shape if need_dgate else 0),
            up.new_empty(up.shape if need_dup else 0),
        )
    if gate.numel():
        (dys, gates, ups), n_rows, n_cols, grid, settings = _geometry("gated_bwd", [dy, gate, up], packed)
        _gated_bwd_kernel[grid](
            dys.data, gates.data, ups.data, dgate if need_dgate else None, dup if need_dup else None,
            dys.layout, gates.layout, ups.layout, 2 * n_cols if packed else n_cols, n_rows, n_cols,
            KIND=kind, **settings,
        )  # fmt: skip
    return result
