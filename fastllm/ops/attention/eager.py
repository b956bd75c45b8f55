"""Attention in eager PyTorch, chunk by chunk: every feature, no more than a chunk of scores at any time.

The backward computes the scores again from the saved row statistics. A chunk is sized for a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...cpu import multiplies
from .call import AttentionCall, ForwardResult, OutputGradients, Wanted, numbers_of, sequence_bias, sequence_call
from .reference import dropout_kept, visible

# Scores held at once. 2^19 in fp32 are 2 MB, a core's L2 on server CPUs; GPUs want larger launches. Guesses, and so are
# OTHER_CHUNK for other devices and FEWEST_ROWS, the rows that a chunk has however many columns there are.
CHUNK = {"cpu": 2**19, "cuda": 2**26}
OTHER_CHUNK, FEWEST_ROWS = 2**24, 16


class AttentionGradients(NamedTuple):
    """Where the backward writes: dq, dk and dv are filled, dbias and dsinks added to. None where not wanted."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dbias: torch.Tensor | None
    dsinks: torch.Tensor | None


class _Chunk(NamedTuple):
    """Batches and key heads of a chunk."""

    batch: slice
    heads: slice


class _Dense:
    """One dense call: (B, H, S, D) tensors, and what each chunk needs of the features."""

    def __init__(self, call: AttentionCall, first_plane: int):
        self.call, self.first_plane = call, first_plane
        self.batch, self.heads, self.rows, _ = call.q.shape
        self.heads_kv, self.cols = call.k.shape[1], call.k.shape[2]
        self.group = self.heads // max(self.heads_kv, 1)
        self.q = self.by_group(call.q)
        self.diagonal = self.cols - self.rows
        self.offset = self.diagonal if call.bottom_right else 0
        self.wide = torch.promote_types(call.q.dtype, torch.float32)
        # fp16 products on CPUs are slower than fp32 and round their sums; bf16 ones too, but where the CPU has them.
        keeps = call.q.device.type != "cpu" or (call.q.dtype != torch.float16 and multiplies(call.q.dtype))
        self.narrow = call.q.dtype if keeps else self.wide

    def chunks(self) -> Iterator[tuple[_Chunk, list[slice]]]:
        """Chunks, each with slices of its query rows, whose scores fit; the rows run innermost."""
        limit = max(CHUNK.get(self.q.device.type, OTHER_CHUNK), FEWEST_ROWS * self.cols)
        plane = max(self.group * self.rows * self.cols, 1)
        n_b = n_h = 1
        n_r = max(self.rows, 1)
        if plane > limit:
            n_r = max(1, limit // (self.group * self.cols))
        else:
            n_h = max(1, min(self.heads_kv, limit // plane))
            n_b = max(1, limit // (plane * max(self.heads_kv, 1)))
        row_slices = [slice(r, min(r + n_r, self.rows)) for r in range(0, self.rows, n_r)]
        for b in range(0, self.batch, n_b):
            for h in range(0, self.heads_kv, n_h):
                yield _Chunk(slice(b, min(b + n_b, self.batch)), slice(h, min(h + n_h, self.heads_kv))), row_slices

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, ...) as (B, Hkv, group, ...)."""
        return x.unflatten(1, (self.heads_kv, self.group))

    def columns(self, rows: slice) -> slice:
        """The columns that any of ``rows`` sees."""
        low, high = 0, self.cols
        if self.call.left >= 0:
            low = min(max(rows.start + self.offset - self.call.left, 0), self.cols)
        if self.call.right >= 0:
            high = min(max(rows.stop - 1 + self.offset + self.call.right + 1, low), self.cols)
        return slice(low, high)

    def rows_of(self, x: torch.Tensor, at: _Chunk, rows: slice) -> torch.Tensor:
        """A (B, Hkv, group, S, D) tensor's chunk as (b, h, group * rows, D)."""
        return x[at.batch, at.heads, :, rows].flatten(2, 3)

    def by_rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """(b, h, group * rows, D) as (b, h, group, rows, D), where there are no rows too."""
        return x.unflatten(2, (self.group, rows.stop - rows.start))

    def scores(self, q, k, at: _Chunk, rows: slice, cols: slice):
        """``(t, tanh of the soft cap or None)``: (b, h, group, rows, cols), -inf where not visible."""
        call = self.call
        t = self.by_rows(torch.matmul(q, k[:, :, cols].transpose(-1, -2)), rows)
        t = t.mul_(call.scale)
        capped = None
        if call.softcap:
            capped = t.div_(call.softcap).tanh_()
            t = capped * call.softcap
        i = torch.arange(rows.start, rows.stop, device=t.device)
        j = torch.arange(cols.start, cols.stop, device=t.device)
        if call.slopes is not None:
            slopes = call.slopes.to(t.dtype)
            slopes = self.by_group(slopes[at.batch] if slopes.dim() == 2 else slopes[None])
            distance = (i.view(-1, 1) + self.diagonal - j).abs().to(t.dtype)
            t = t.sub_(slopes[:, at.heads, :, None, None] * distance)
        if call.bias is not None:
            bias = self.bias_chunk(call.bias, at, rows, cols)
            t = t.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else t.add_(bias)
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        edge = (call.left >= 0 and last - call.left > cols.start) or (
            call.right >= 0 and first + call.right < cols.stop - 1
        )
        seen = visible(i, j, self.offset, call.left, call.right) if edge else None
        if seen is not None:
            t = t.masked_fill_(~seen, -torch.inf)
        return t, capped

    def bias_chunk(self, bias: torch.Tensor, at: _Chunk, rows: slice, cols: slice) -> torch.Tensor:
        """The chunk of a (B|1, H|1, Sq|1, Sk|1) tensor, with a dimension for the group."""
        bias = bias[at.batch] if bias.shape[0] > 1 else bias
        bias = self.by_group(bias)[:, at.heads] if bias.shape[1] > 1 else bias.unsqueeze(1)
        if bias.shape[3] > 1:
            bias = bias[:, :, :, rows]
        return bias[..., cols] if bias.shape[4] > 1 else bias

    def kept(self, at: _Chunk, rows: slice, cols: slice) -> torch.Tensor:
        """The dropout mask of a chunk, scaled by 1 / (1 - p)."""
        device, p, seed = self.q.device, self.call.dropout_p, self.call.seed
        assert seed is not None, "a call that drops something has a seed"
        planes = torch.arange(self.batch * self.heads, device=device) + self.first_plane
        planes = planes.view(self.batch, self.heads_kv, self.group)[at.batch, at.heads]
        i = torch.arange(rows.start, rows.stop, device=device)
        mask = dropout_kept(seed, planes, i, cols.stop, p)[..., cols]
        return mask.to(self.wide).mul_(1.0 / (1.0 - p) if p < 1 else 0.0)

    def sinks_of(self, sinks: torch.Tensor, at: _Chunk) -> torch.Tensor:
        """The sinks of a chunk's heads, to be broadcast to its scores."""
        return sinks.to(self.wide).view(self.heads_kv, self.group, 1, 1)[at.heads]

    def forward(self, out: torch.Tensor, lse: torch.Tensor, stats: torch.Tensor) -> None:
        """Fills the three."""
        call = self.call
        out, lse, row_max, row_log = (self.by_group(x) for x in (out, lse, stats[0], stats[1]))
        for at, row_slices in self.chunks():
            k = call.k[at.batch, at.heads].to(self.wide)
            v = call.v[at.batch, at.heads].to(self.narrow)
            sink = None if call.sinks is None else self.sinks_of(call.sinks, at)
            for rows in row_slices:
                cols = self.columns(rows)
                t, _ = self.scores(self.rows_of(self.q, at, rows).to(self.wide), k, at, rows, cols)
                highest = t.amax(-1, keepdim=True) if t.shape[-1] else t.new_full((*t.shape[:-1], 1), -torch.inf)
                if sink is not None:
                    highest = torch.maximum(highest, sink)
                highest = highest.masked_fill(highest == -torch.inf, 0.0)
                p = t.sub_(highest).exp_()
                total = p.sum(-1, keepdim=True)
                if sink is not None:
                    total += torch.exp(sink - highest)
                empty = total == 0
                total = total.masked_fill(empty, 1.0)
                log = total.log()
                where = (at.batch, at.heads, slice(None), rows)
                row_max[where] = highest.squeeze(-1)
                row_log[where] = log.masked_fill(empty, torch.inf).squeeze(-1)
                lse[where] = (highest + log).masked_fill(empty, -torch.inf).squeeze(-1)
                p = p.div_(total)
                if call.dropout_p > 0:
                    p *= self.kept(at, rows, cols)
                o = torch.matmul(p.flatten(2, 3).to(self.narrow), v[:, :, cols])
                out[where] = self.by_rows(o, rows).to(out.dtype)

    def backward(self, forward: ForwardResult, upstream: OutputGradients, grads: AttentionGradients) -> None:
        """Writes ``grads``. dbias and dsinks are in at least fp32."""
        call = self.call
        dk, dv, dbias, dsinks = grads[1:]
        out, row_max, row_log = (self.by_group(x) for x in (forward.out, *forward.stats))
        dout = self.by_group(upstream.dout)
        dlse, dq = (None if x is None else self.by_group(x) for x in (upstream.dlse, grads.dq))
        for at, row_slices in self.chunks():
            plane = (at.batch, at.heads)
            k_wide = call.k[plane].to(self.wide)
            k, v = (x[plane].to(self.narrow) for x in (call.k, call.v))
            one = len(row_slices) == 1
            dk_sum = dv_sum = None
            if not one:
                dk_sum, dv_sum = (torch.zeros(x.shape, dtype=self.wide, device=x.device) for x in (k, v))
            for rows in row_slices:
                where = (*plane, slice(None), rows)
                cols = self.columns(rows)
                q = self.rows_of(self.q, at, rows)
                g = self.rows_of(dout, at, rows)
                delta = (g.to(self.wide) * self.rows_of(out, at, rows).to(self.wide)).sum(-1, keepdim=True)
                delta = self.by_rows(delta, rows)
                if dlse is not None:
                    delta -= dlse[where].unsqueeze(-1)
                high, log = row_max[where].unsqueeze(-1), row_log[where].unsqueeze(-1)
                delta = delta.masked_fill(log == torch.inf, 0.0)
                t, capped = self.scores(q.to(self.wide), k_wide, at, rows, cols)
                p = t.sub_(high).sub_(log).exp_()
                g = g.to(self.narrow)
                kept = self.kept(at, rows, cols) if call.dropout_p > 0 else None
                if dv is not None:
                    dropped = (p if kept is None else p * kept).flatten(2, 3).to(self.narrow)
                    self._collect(dv, dv_sum, torch.matmul(dropped.transpose(-1, -2), g), at, cols)
                dp = self.by_rows(torch.matmul(g, v[:, :, cols].transpose(-1, -2)).to(self.wide), rows)
                if kept is not None:
                    dp *= kept
                ds = dp.sub_(delta).mul_(p)
                if dsinks is not None and call.sinks is not None:
                    per_head = (torch.exp(self.sinks_of(call.sinks, at) - high - log) * delta).sum((0, 3, 4))
                    dsinks.view(self.heads_kv, self.group)[at.heads] -= per_head
                if dbias is not None:
                    of_chunk = self.bias_chunk(dbias, at, rows, cols)
                    of_chunk += ds.sum_to_size(of_chunk.shape)
                if capped is not None:
                    ds = ds.mul_(1.0 - capped * capped)
                if dq is None and dk is None:
                    continue
                ds = ds.mul_(call.scale).flatten(2, 3).to(self.narrow)
                if dq is not None:
                    dq[where] = self.by_rows(torch.matmul(ds, k[:, :, cols]), rows).to(dq.dtype)
                if dk is not None:
                    self._collect(dk, dk_sum, torch.matmul(ds.transpose(-1, -2), q.to(self.narrow)), at, cols)
            for grad, total in ((dk, dk_sum), (dv, dv_sum)):
                if grad is not None and total is not None:
                    grad[plane] = total.to(grad.dtype)

    @staticmethod
    def _collect(grad, total, product, at: _Chunk, cols: slice) -> None:
        """Adds ``product`` to the columns ``cols`` of ``total``; without a total it is the gradient itself."""
        plane = (at.batch, at.heads)
        if total is not None:
            total[:, :, cols] += product
        elif cols.stop - cols.start == grad.shape[2]:
            grad[plane] = product.to(grad.dtype)
        else:
            grad[plane] = 0
            grad[(*plane, cols)] = product.to(grad.dtype)


class Sequence(NamedTuple):
    """A sequence of a packed call, or a whole dense call, and where its rows lie in the call's tensors."""

    dense: _Dense
    index: int | None = None
    at_q: slice | None = None
    at_k: slice | None = None

    def of_q(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor shaped like the query."""
        return x if self.at_q is None else x[self.at_q].transpose(0, 1).unsqueeze(0)

    def of_k(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor shaped like the key."""
        return x if self.at_k is None else x[self.at_k].transpose(0, 1).unsqueeze(0)

    def of_row(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor with one number a row of scores, or two."""
        return x if self.at_q is None else x[..., self.at_q].unsqueeze(-3)

    def of_bias(self, x: torch.Tensor) -> torch.Tensor:
        """The view of a tensor shaped like the bias."""
        return x if self.index is None else sequence_bias(x, self.index, self.dense.rows, self.dense.cols)


def if_given(view: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor | None) -> torch.Tensor | None:
    """``view(x)``, or None where there is no tensor."""
    return None if x is None else view(x)


def each_sequence(call: AttentionCall) -> Iterator[Sequence]:
    """The sequences of a packed call, or the dense call as it is."""
    if call.cu_q is None or call.cu_k is None:
        yield Sequence(_Dense(call, 0))
        return
    bounds_q, bounds_k = numbers_of(call.cu_q), numbers_of(call.cu_k)
    for b in range(len(bounds_q) - 1):
        at_q, at_k = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        yield Sequence(_Dense(sequence_call(call, b, at_q, at_k), b * call.q.shape[1]), b, at_q, at_k)


def eager_attention_fwd(call: AttentionCall, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills ``out``; returns lse and the statistics for the backward: the row maxima and natural logs of the sums.

    It does what kernels/attention/forward.py's ``attention_fwd`` does, whose second statistic is a base-2 logarithm.
    """
    q = call.q
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[1], q.shape[0]) if call.packed else q.shape[:3]
    lse = q.new_full(shape, -torch.inf, dtype=wide)
    stats = q.new_zeros((2, *shape), dtype=wide)
    stats[1] = torch.inf
    if out.numel() or lse.numel():
        for sequence in each_sequence(call):
            sequence.dense.forward(sequence.of_q(out), sequence.of_row(lse), sequence.of_row(stats))
    return lse, stats


def eager_attention_bwd(
    call: AttentionCall, forward: ForwardResult, upstream: OutputGradients, wanted: Wanted
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fills the buffers of ``wanted``; returns (dbias, dsinks), None where not wanted."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    dbias = (
        torch.zeros(call.bias.shape, dtype=wide, device=call.q.device)
        if wanted.bias and call.bias is not None
        else None
    )
    dsinks = (
        torch.zeros(call.sinks.shape, dtype=wide, device=call.q.device)
        if wanted.sinks and call.sinks is not None
        else None
    )
    for grad in wanted[:3]:
        if grad is not None and (call.packed or not upstream.dout.numel()):
            grad.zero_()
    for sequence in each_sequence(call):
        sequence.dense.backward(
            ForwardResult(sequence.of_q(forward.out), sequence.of_row(forward.stats)),
            OutputGradients(sequence.of_q(upstream.dout), if_given(sequence.of_row, upstream.dlse)),
            AttentionGradients(
                if_given(sequence.of_q, wanted.dq), if_given(sequence.of_k, wanted.dk),
                if_given(sequence.of_k, wanted.dv), if_given(sequence.of_bias, dbias), dsinks,
            ),
        )  # fmt: skip
    return (
        None if dbias is None or call.bias is None else dbias.to(call.bias.dtype),
        None if dsinks is None or call.sinks is None else dsinks.to(call.sinks.dtype),
    )
