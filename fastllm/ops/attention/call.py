"""Argument checks of attention, and its normal form."""

from __future__ import annotations

import itertools
import math
import numbers
from typing import NamedTuple

import torch


def check_qkv(op: str, query, key, value) -> None:
    """TypeError or ValueError unless the three are floating tensors of one dtype on one device."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"{op}: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"{op}: query, key and value must be on one device, got {query.device}, {key.device} and {value.device}"
        )


def check_dropout(op: str, p) -> float:
    if not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        raise ValueError(f"{op}: dropout_p must lie between 0 and 1, got {p!r}")
    return float(p)


def check_scale(op: str, scale, dim: int) -> float:
    """``scale``, by default 1 / sqrt(dim)."""
    if scale is None:
        return 1.0 / math.sqrt(dim) if dim > 0 else 1.0
    if not isinstance(scale, numbers.Real) or not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")
    return float(scale)


def check_window(op: str, window, causal: bool) -> tuple[int, int]:
    """(left, right), -1 where unbounded; causal bounds the right at 0."""
    left = right = -1
    if window is not None:
        try:
            left, right = (-1 if side is None else side for side in window)
        except (TypeError, ValueError):
            raise ValueError(f"{op}: window must be (left, right), each an integer or None; got {window!r}") from None
        for side in (left, right):
            if not isinstance(side, int) or isinstance(side, bool) or side < -1:
                raise ValueError(
                    f"{op}: window must hold integers >= 0, or None or -1 for an unbounded side; got {window!r}"
                )
    return left, 0 if causal else right


def _same_device(op: str, name: str, x, query) -> None:
    if x.device != query.device:
        raise ValueError(f"{op}: {name} is on {x.device}, query on {query.device}; they must be together")


def _check_cu(op: str, name: str, cu, total: int, query) -> torch.Tensor:
    if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64):
        got = str(cu.dtype) if isinstance(cu, torch.Tensor) else type(cu).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, got {got}")
    if cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape (sequences + 1,), got {list(cu.shape)}")
    _same_device(op, name, cu, query)
    # Values on a GPU are not looked at: that would wait for it.
    if cu.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu) is torch.Tensor:
        bounds = cu.tolist()
        if bounds[0] != 0 or bounds[-1] > total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"{op}: {name} must rise from 0 to at most {total} rows, got {bounds[:4]} ... {bounds[-1]}"
            )
    return cu.contiguous()


def check_attention(
    op: str, query, key, value, sinks, alibi_slopes, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
):  # fmt: skip
    """(sinks, alibi_slopes, bias, cu_seqlens_q, cu_seqlens_k) in normal form, or an error that names what is wrong."""
    check_qkv(op, query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    dims, layout = (3, "(total, heads, dim) with cu_seqlens") if packed else (4, "(batch, heads, length, dim)")
    if not query.dim() == key.dim() == value.dim() == dims:
        raise ValueError(f"{op}: expected {layout}, got {shapes}")
    heads, heads_kv = query.shape[-2 if packed else 1], key.shape[-2 if packed else 1]
    if key.shape[:-1] != value.shape[:-1] or (not packed and query.shape[0] != key.shape[0]):
        raise ValueError(f"{op}: key and value must agree but for dim, and all in batch; got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{op}: query and key must have one head dim, got {shapes}")
    if (heads_kv == 0 and heads > 0) or (heads_kv > 0 and heads % heads_kv):
        raise ValueError(f"{op}: query's heads must be a multiple of key's, got {heads} and {heads_kv}")
    if packed:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must be given together")
        cu_seqlens_q = _check_cu(op, "cu_seqlens_q", cu_seqlens_q, query.shape[0], query)
        cu_seqlens_k = _check_cu(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0], query)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"{op}: cu_seqlens_q and cu_seqlens_k must name as many sequences, got "
                f"{cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1}"
            )
        batch, rows, cols = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
        if cu_seqlens_q.dtype != cu_seqlens_k.dtype:
            cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    else:
        batch, rows, cols = query.shape[0], query.shape[2], key.shape[2]
        if max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError(f"{op}: max_seqlen_q and max_seqlen_k belong to packed calls, with cu_seqlens")
    if sinks is not None:
        if not isinstance(sinks, torch.Tensor) or tuple(sinks.shape) != (heads,) or not sinks.is_floating_point():
            raise ValueError(f"{op}: sinks must be floating, of shape (heads,) = ({heads},), got {_say(sinks)}")
        _same_device(op, "sinks", sinks, query)
        sinks = sinks.contiguous()
    if alibi_slopes is not None:
        good = isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.is_floating_point()
        if not good or tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes must be floating, of shape ({heads},) or ({batch}, {heads}), "
                f"got {_say(alibi_slopes)}"
            )
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: alibi_slopes are constants and have no gradient; pass alibi_slopes.detach()")
        _same_device(op, "alibi_slopes", alibi_slopes, query)
        alibi_slopes = alibi_slopes.to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None:
        bias = _check_bias(op, bias, (batch, heads, rows, cols), query, packed)
    return sinks, alibi_slopes, bias, cu_seqlens_q, cu_seqlens_k


def _say(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def _check_bias(op: str, bias, full, query, packed: bool) -> torch.Tensor:
    if not isinstance(bias, torch.Tensor) or not (bias.dtype == torch.bool or bias.is_floating_point()):
        raise TypeError(f"{op}: bias must be a boolean or floating-point tensor, got {_say(bias)}")
    _same_device(op, "bias", bias, query)
    if packed and None in full:
        raise ValueError(f"{op}: a bias with packed sequences needs max_seqlen_q and max_seqlen_k")
    if bias.dim() > 4 or any(
        size not in (1, want) for size, want in zip(reversed(bias.shape), reversed(full), strict=False)
    ):
        raise ValueError(f"{op}: bias must broadcast to {list(full)}, got shape {list(bias.shape)}")
    return bias[(None,) * (4 - bias.dim())]


class Call(NamedTuple):
    """A checked call in normal form; see :mod:`.attention`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None
    seed: torch.Tensor | None
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    scale: float
    softcap: float
    left: int
    right: int
    bottom_right: bool
    dropout_p: float


class Forward(NamedTuple):
    """What the backward takes from the forward: the output, and (2, *lse.shape) row maxima and logs of row sums."""

    out: torch.Tensor
    stats: torch.Tensor


class Upstream(NamedTuple):
    """The gradients that come in."""

    dout: torch.Tensor
    dlse: torch.Tensor | None


class Wanted(NamedTuple):
    """What a backward is to give: buffers to fill or None, and whether the gradients of bias and sinks are wanted."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    bias: bool
    sinks: bool
