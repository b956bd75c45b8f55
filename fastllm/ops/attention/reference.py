"""Attention's definition in eager PyTorch, and the dropout mask that every backend agrees on."""

from __future__ import annotations

import torch

from ..shared.philox import dropout_scale, rows_kept
from .call import AttentionCall, numbers_of, sequence_call


def dropout_kept(seed: torch.Tensor, planes: torch.Tensor, rows: torch.Tensor, cols: int, p: float) -> torch.Tensor:
    """Which probabilities dropout keeps: bool (*planes.shape, len(rows), cols).

    Args:
        seed: two int64, the Philox key and the number of plane 0 (:func:`fastllm.ops.shared.philox.draw_seed`).
        planes: int64, batch * heads + head of each plane of scores.
        rows: (r,) int64, query positions within their sequence.
        cols: how many key positions, from 0.
        p: the probability of dropping, exact to 2^-32.
    """
    return rows_kept(seed[0], ((planes + seed[1]) << 32).unsqueeze(-1) + rows, cols, p)


def visible(rows: torch.Tensor, cols: torch.Tensor, offset: int, left: int, right: int) -> torch.Tensor | None:
    """bool (rows, cols): cols within [row + offset - left, row + offset + right]; None if all are (-1: unbounded)."""
    distance = cols - (rows.view(-1, 1) + offset)
    if left >= 0 and right >= 0:
        return (distance >= -left) & (distance <= right)
    if left >= 0:
        return distance >= -left
    return distance <= right if right >= 0 else None


def dense_attention(call: AttentionCall, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a dense call in at least fp32, all scores at once.

    ``kept``: the dropout mask, (B, H, Sq, Sk), if the call drops anything.
    """
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (call.q, call.k, call.v))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    t = q @ k.transpose(-1, -2) * call.scale
    if call.softcap:
        t = call.softcap * torch.tanh(t / call.softcap)
    rows = torch.arange(q.shape[2], device=q.device)
    cols = torch.arange(k.shape[2], device=q.device)
    offset = k.shape[2] - q.shape[2]
    if call.slopes is not None:
        distance = (rows.view(-1, 1) + offset - cols).abs()
        t = t - call.slopes.to(wide)[..., None, None] * distance
    if call.bias is not None:
        mask = call.bias
        t = t.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else t + mask.to(wide)
    mask = visible(rows, cols, offset if call.bottom_right else 0, call.left, call.right)
    if mask is not None:
        t = t.masked_fill(~mask, -torch.inf)
    # The sink is one more column, without a value; a column of -inf keeps the maximum defined where there are no keys.
    sink = t.new_full((), -torch.inf) if call.sinks is None else call.sinks.to(wide).view(-1, 1, 1)
    sink = sink.expand(*t.shape[:-1], 1)
    t = torch.cat([t, sink], -1)
    highest = t.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    e = torch.exp(t - highest)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (total.log() + highest).masked_fill(empty, -torch.inf).squeeze(-1)
    p = (e / total)[..., :-1]
    if kept is not None:
        p = p.masked_fill(~kept, 0.0) * dropout_scale(call.dropout_p)
    return p @ v, lse


def _sequence(call: AttentionCall, first_plane: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dense_attention` with the dropout mask of the planes from ``first_plane`` on."""
    if call.dropout_p == 0:
        return dense_attention(call)
    batch, heads, rows, _ = call.q.shape
    device, seed = call.q.device, call.seed
    assert seed is not None, "a call that drops something has a seed"
    planes = torch.arange(first_plane, first_plane + batch * heads, device=device).view(batch, heads)
    kept = dropout_kept(seed, planes, torch.arange(rows, device=device), call.k.shape[2], call.dropout_p)
    return dense_attention(call, kept)


def reference(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a call; out in q's dtype, lse in at least fp32."""
    q = call.q
    if call.cu_q is None or call.cu_k is None:
        out, lse = _sequence(call, 0)
        return out.to(q.dtype), lse
    heads = q.shape[1]
    outs, lses = [], []
    bounds_q, bounds_k = numbers_of(call.cu_q), numbers_of(call.cu_k)
    for b in range(len(bounds_q) - 1):
        at_q, at_k = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        out, lse = _sequence(sequence_call(call, b, at_q, at_k), b * heads)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - bounds_q[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs.append(q.new_zeros(rest, heads, call.v.shape[-1], dtype=wide))
    lses.append(q.new_full((heads, rest), -torch.inf, dtype=wide))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)
