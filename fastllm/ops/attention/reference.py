"""Attention's definition in eager PyTorch, and the dropout mask that every backend agrees on."""

from __future__ import annotations

import torch

from ..shared.philox import philox


def dropout_kept(seed: torch.Tensor, planes: torch.Tensor, rows: torch.Tensor, cols: int, p: float) -> torch.Tensor:
    """Which probabilities dropout keeps: bool (*planes.shape, len(rows), cols).

    Args:
        seed: (1,) int64, the Philox key (:func:`..shared.philox.draw_seed`).
        planes: int64, batch * heads + head of each plane of scores.
        rows: (r,) int64, query positions within their sequence.
        cols: how many key positions, from 0.
        p: the probability of dropping, exact to 2^-32.

    Every element has a random word of its own, keyed by (batch, head, row, column): it depends on no tile size.
    """
    groups = torch.arange((cols + 3) // 4, device=rows.device)
    shape = (*planes.shape, rows.numel(), groups.numel())
    words = philox(seed, groups.expand(shape), rows.view(-1, 1).expand(shape), planes[..., None, None].expand(shape))
    limit = min(int(p * 2**32), 2**32 - 1)
    return torch.stack([w >= limit for w in words], -1).flatten(-2)[..., :cols]


def visible(rows: torch.Tensor, cols: torch.Tensor, offset: int, left: int, right: int) -> torch.Tensor | None:
    """bool (rows, cols): cols within [row + offset - left, row + offset + right]; None if all are (-1: unbounded)."""
    distance = cols - (rows.view(-1, 1) + offset)
    if left >= 0 and right >= 0:
        return (distance >= -left) & (distance <= right)
    if left >= 0:
        return distance >= -left
    return distance <= right if right >= 0 else None


def dense_attention(
    query, key, value, bias=None, sinks=None, alibi_slopes=None, kept=None, *,
    scale, softcap=0.0, left=-1, right=-1, bottom_right=True, dropout_p=0.0,
):  # fmt: skip
    """``(out, lse)`` in at least fp32, all scores at once. ``kept``: the dropout mask, (B, H, Sq, Sk)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (query, key, value))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    t = q @ k.transpose(-1, -2) * scale
    if softcap:
        t = softcap * torch.tanh(t / softcap)
    rows = torch.arange(q.shape[2], device=q.device)
    cols = torch.arange(k.shape[2], device=q.device)
    offset = k.shape[2] - q.shape[2]
    if alibi_slopes is not None:
        distance = (rows.view(-1, 1) + offset - cols).abs()
        t = t - alibi_slopes.to(wide)[..., None, None] * distance
    if bias is not None:
        t = t.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else t + bias.to(wide)
    mask = visible(rows, cols, offset if bottom_right else 0, left, right)
    if mask is not None:
        t = t.masked_fill(~mask, -torch.inf)
    # The sink is one more column, without a value; a column of -inf keeps the maximum defined where there are no keys.
    sink = t.new_full((), -torch.inf) if sinks is None else sinks.to(wide).view(-1, 1, 1)
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
    if dropout_p > 0:
        p = p.masked_fill(~kept, 0.0) * (1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0)
    return p @ v, lse


def reference(
    q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p
):  # fmt: skip
    """``(out, lse)`` of a call in normal form (see ops/attention.py); out in q's dtype, lse in at least fp32."""

    def mask(planes, rows, cols):
        if dropout_p == 0:
            return None
        return dropout_kept(seed, planes, torch.arange(rows, device=q.device), cols, dropout_p)

    spec = dict(scale=scale, softcap=softcap, left=left, right=right, bottom_right=bottom_right, dropout_p=dropout_p)
    if cu_q is None:
        heads = q.shape[1]
        planes = torch.arange(q.shape[0] * heads, device=q.device).view(-1, heads)
        kept = mask(planes, q.shape[2], k.shape[2])
        out, lse = dense_attention(q, k, v, bias, sinks, alibi_slopes, kept, **spec)
        return out.to(q.dtype), lse
    heads = q.shape[1]
    outs, lses = [], []
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(bounds_q) - 1):
        at_q, at_k = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        rows, cols = at_q.stop - at_q.start, at_k.stop - at_k.start
        planes = torch.arange(b * heads, (b + 1) * heads, device=q.device).view(1, heads)
        out, lse = dense_attention(
            *(x[at].transpose(0, 1).unsqueeze(0) for x, at in ((q, at_q), (k, at_k), (v, at_k))),
            sequence_bias(bias, b, rows, cols), sinks, sequence_slopes(alibi_slopes, b), mask(planes, rows, cols),
            **spec,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - bounds_q[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs.append(q.new_zeros(rest, heads, v.shape[-1], dtype=wide))
    lses.append(q.new_full((heads, rest), -torch.inf, dtype=wide))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)


def sequence_bias(bias, b: int, rows: int, cols: int):
    """The part of a packed call's bias that belongs to sequence ``b``."""
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[b : b + 1]
    return bias[:, :, : rows if bias.shape[2] > 1 else 1, : cols if bias.shape[3] > 1 else 1]


def sequence_slopes(slopes, b: int):
    """The ALiBi slopes of sequence ``b``."""
    return slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
