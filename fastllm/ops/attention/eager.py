"""Attention in eager PyTorch, chunk by chunk: every feature, no more than a chunk of scores at any time.

The backward recomputes the scores from the saved row statistics. A chunk is sized for a core's cache.
"""

from __future__ import annotations

import torch

from ...cpu import multiplies
from .reference import dropout_kept, sequence_bias, sequence_slopes, visible

# Scores held at once. 2^19 in fp32 are 2 MB, a core's L2 on server CPUs; GPUs want larger launches.
CHUNK = {"cpu": 2**19, "cuda": 2**26}


def _chunks(device, batch, heads_kv, group, rows, cols):
    """Slices (batches, key heads, query rows) whose scores fit a chunk; rows run innermost."""
    limit = max(CHUNK.get(device.type, 2**24), 16 * cols)
    plane = max(group * rows * cols, 1)
    n_b = n_h = 1
    n_r = max(rows, 1)
    if plane > limit:
        n_r = max(1, limit // (group * cols))
    else:
        n_h = max(1, min(heads_kv, limit // plane))
        n_b = max(1, limit // (plane * max(heads_kv, 1)))
    for b in range(0, batch, n_b):
        for h in range(0, heads_kv, n_h):
            yield (
                slice(b, min(b + n_b, batch)),
                slice(h, min(h + n_h, heads_kv)),
                [slice(r, min(r + n_r, rows)) for r in range(0, rows, n_r)],
            )


class _Dense:
    """One dense call: (B, H, S, D) tensors, and what each chunk needs of the features."""

    def __init__(self, q, k, v, bias, sinks, slopes, seed, first_plane, spec):
        self.batch, self.heads, self.rows, self.dim = q.shape
        self.heads_kv, self.cols = k.shape[1], k.shape[2]
        self.group = self.heads // max(self.heads_kv, 1)
        self.q = q.unflatten(1, (self.heads_kv, self.group))
        self.k, self.v = k, v
        self.bias, self.sinks, self.slopes, self.seed, self.first_plane = bias, sinks, slopes, seed, first_plane
        self.scale, self.softcap, self.left, self.right, bottom_right, self.dropout_p = spec
        self.diagonal = self.cols - self.rows
        self.offset = self.diagonal if bottom_right else 0
        self.wide = torch.promote_types(q.dtype, torch.float32)
        # fp16 products on CPUs are slower than fp32 and round their sums; bf16 ones too, but where the CPU has them.
        keeps = q.device.type != "cpu" or (q.dtype != torch.float16 and multiplies(q.dtype))
        self.narrow = q.dtype if keeps else self.wide

    def chunks(self):
        return _chunks(self.q.device, self.batch, self.heads_kv, self.group, self.rows, self.cols)

    def by_group(self, x):
        """(B, H, ...) as (B, Hkv, group, ...)."""
        return x.unflatten(1, (self.heads_kv, self.group))

    def columns(self, rows: slice) -> slice:
        """The columns that any of ``rows`` sees."""
        low, high = 0, self.cols
        if self.left >= 0:
            low = min(max(rows.start + self.offset - self.left, 0), self.cols)
        if self.right >= 0:
            high = min(max(rows.stop - 1 + self.offset + self.right + 1, low), self.cols)
        return slice(low, high)

    def part(self, x, at, rows):
        """A (B, Hkv, group, S, D) tensor's chunk as (b, h, group * rows, D)."""
        return x[at[0], at[1], :, rows].flatten(2, 3)

    def scores(self, q, k, at, rows: slice, cols: slice):
        """``(t, tanh of the soft cap or None)``: (b, h, group, rows, cols), -inf where not visible."""
        t = torch.matmul(q, k[:, :, cols].transpose(-1, -2)).unflatten(2, (self.group, -1))
        t = t.mul_(self.scale)
        capped = None
        if self.softcap:
            capped = t.div_(self.softcap).tanh_()
            t = capped * self.softcap
        i = torch.arange(rows.start, rows.stop, device=t.device)
        j = torch.arange(cols.start, cols.stop, device=t.device)
        if self.slopes is not None:
            slopes = self.slopes.to(t.dtype)
            slopes = (slopes[at[0]] if slopes.dim() == 2 else slopes[None]).unflatten(1, (self.heads_kv, self.group))
            distance = (i.view(-1, 1) + self.diagonal - j).abs().to(t.dtype)
            t = t.sub_(slopes[:, at[1], :, None, None] * distance)
        if self.bias is not None:
            bias = self.bias_part(self.bias, at, rows, cols)
            t = t.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else t.add_(bias)
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        edge = (self.left >= 0 and last - self.left > cols.start) or (
            self.right >= 0 and first + self.right < cols.stop - 1
        )
        if edge:
            t = t.masked_fill_(~visible(i, j, self.offset, self.left, self.right), -torch.inf)
        return t, capped

    def bias_part(self, bias, at, rows, cols):
        """The chunk of a (B|1, H|1, Sq|1, Sk|1) tensor, with a dimension for the group."""
        bias = bias[at[0]] if bias.shape[0] > 1 else bias
        bias = self.by_group(bias)[:, at[1]] if bias.shape[1] > 1 else bias.unsqueeze(1)
        if bias.shape[3] > 1:
            bias = bias[:, :, :, rows]
        return bias[..., cols] if bias.shape[4] > 1 else bias

    def kept(self, at, rows, cols):
        """The dropout mask of a chunk, scaled by 1 / (1 - p)."""
        device = self.q.device
        planes = torch.arange(self.batch * self.heads, device=device) + self.first_plane
        planes = planes.view(self.batch, self.heads_kv, self.group)[at[0], at[1]]
        i = torch.arange(rows.start, rows.stop, device=device)
        mask = dropout_kept(self.seed, planes, i, cols.stop, self.dropout_p)[..., cols]
        return mask.to(self.wide).mul_(1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1 else 0.0)

    def forward(self, out, lse, stats):
        out, lse, row_max, row_log = (self.by_group(x) for x in (out, lse, stats[0], stats[1]))
        for *at, row_chunks in self.chunks():
            k = self.k[at[0], at[1]].to(self.wide)
            v = self.v[at[0], at[1]].to(self.narrow)
            for rows in row_chunks:
                cols = self.columns(rows)
                t, _ = self.scores(self.part(self.q, at, rows).to(self.wide), k, at, rows, cols)
                if self.sinks is not None:
                    sink = self.sinks.to(self.wide).view(self.heads_kv, self.group, 1, 1)[at[1]]
                    highest = torch.maximum(t.amax(-1, keepdim=True), sink) if t.shape[-1] else sink.expand(
                        *t.shape[:-1], 1
                    )  # fmt: skip
                elif t.shape[-1]:
                    highest = t.amax(-1, keepdim=True)
                else:
                    highest = t.new_full((*t.shape[:-1], 1), -torch.inf)
                highest = highest.masked_fill(highest == -torch.inf, 0.0)
                p = t.sub_(highest).exp_()
                total = p.sum(-1, keepdim=True)
                if self.sinks is not None:
                    total += torch.exp(sink - highest)
                empty = total == 0
                total = total.masked_fill(empty, 1.0)
                log = total.log()
                where = (at[0], at[1], slice(None), rows)
                row_max[where] = highest.squeeze(-1)
                row_log[where] = log.masked_fill(empty, torch.inf).squeeze(-1)
                lse[where] = (highest + log).masked_fill(empty, -torch.inf).squeeze(-1)
                p = p.div_(total)
                if self.dropout_p > 0:
                    p *= self.kept(at, rows, cols)
                o = torch.matmul(p.flatten(2, 3).to(self.narrow), v[:, :, cols])
                out[where] = o.unflatten(2, (self.group, -1)).to(out.dtype)

    def backward(self, dout, dlse, out, stats, dq, dk, dv, dbias, dsinks):
        """Fills dq, dk and dv; adds to dbias and dsinks (both in at least fp32). None where not wanted."""
        dout, out, row_max, row_log = (self.by_group(x) for x in (dout, out, stats[0], stats[1]))
        dlse, dq = (None if x is None else self.by_group(x) for x in (dlse, dq))
        for *at, row_chunks in self.chunks():
            k_wide = self.k[at[0], at[1]].to(self.wide)
            k, v = (x[at[0], at[1]].to(self.narrow) for x in (self.k, self.v))
            one = len(row_chunks) == 1
            dk_sum = dv_sum = None
            if not one:
                dk_sum, dv_sum = (torch.zeros(x.shape, dtype=self.wide, device=x.device) for x in (k, v))
            for rows in row_chunks:
                where = (at[0], at[1], slice(None), rows)
                cols = self.columns(rows)
                q = self.part(self.q, at, rows)
                g = self.part(dout, at, rows)
                delta = (g.to(self.wide) * self.part(out, at, rows).to(self.wide)).sum(-1, keepdim=True)
                delta = delta.unflatten(2, (self.group, -1))
                if dlse is not None:
                    delta -= dlse[where].unsqueeze(-1)
                high, log = row_max[where].unsqueeze(-1), row_log[where].unsqueeze(-1)
                delta = delta.masked_fill(log == torch.inf, 0.0)
                t, capped = self.scores(q.to(self.wide), k_wide, at, rows, cols)
                p = t.sub_(high).sub_(log).exp_()
                g = g.to(self.narrow)
                kept = self.kept(at, rows, cols) if self.dropout_p > 0 else None
                if dv is not None:
                    dropped = (p if kept is None else p * kept).flatten(2, 3).to(self.narrow)
                    self._collect(dv, dv_sum, torch.matmul(dropped.transpose(-1, -2), g), at, cols)
                dp = torch.matmul(g, v[:, :, cols].transpose(-1, -2)).to(self.wide).unflatten(2, (self.group, -1))
                if kept is not None:
                    dp *= kept
                ds = dp.sub_(delta).mul_(p)
                if dsinks is not None:
                    sink = self.sinks.to(self.wide).view(self.heads_kv, self.group, 1, 1)[at[1]]
                    per_head = (torch.exp(sink - high - log) * delta).sum((0, 3, 4))
                    dsinks.view(self.heads_kv, self.group)[at[1]] -= per_head
                if dbias is not None:
                    part = self.bias_part(dbias, at, rows, cols)
                    part += ds.sum_to_size(part.shape)
                if capped is not None:
                    ds = ds.mul_(1.0 - capped * capped)
                if dq is None and dk is None:
                    continue
                ds = ds.mul_(self.scale).flatten(2, 3).to(self.narrow)
                if dq is not None:
                    dq[where] = torch.matmul(ds, k[:, :, cols]).unflatten(2, (self.group, -1)).to(dq.dtype)
                if dk is not None:
                    self._collect(dk, dk_sum, torch.matmul(ds.transpose(-1, -2), q.to(self.narrow)), at, cols)
            if not one:
                for grad, total in ((dk, dk_sum), (dv, dv_sum)):
                    if grad is not None:
                        grad[at[0], at[1]] = total.to(grad.dtype)

    @staticmethod
    def _collect(grad, total, piece, at, cols):
        if total is not None:
            total[:, :, cols] += piece
        elif cols.stop - cols.start == grad.shape[2]:
            grad[at[0], at[1]] = piece.to(grad.dtype)
        else:
            grad[at[0], at[1]] = 0
            grad[at[0], at[1], cols] = piece.to(grad.dtype)


def _sequences(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, spec):
    """(dense call, view of a query-shaped tensor, of a key-shaped one, of a per-row one) for each sequence."""
    if cu_q is None:
        call = _Dense(q, k, v, bias, sinks, slopes, seed, 0, spec)
        yield call, lambda x: x, lambda x: x, lambda x: x, 0
        return
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(bounds_q) - 1):
        at_q, at_k = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])

        def of_q(x, at=at_q):
            return x[at].transpose(0, 1).unsqueeze(0)

        def of_k(x, at=at_k):
            return x[at].transpose(0, 1).unsqueeze(0)

        def of_row(x, at=at_q):
            return x[..., at].unsqueeze(-3)

        call = _Dense(
            of_q(q), of_k(k), of_k(v), sequence_bias(bias, b, at_q.stop - at_q.start, at_k.stop - at_k.start),
            sinks, sequence_slopes(slopes, b), seed, b * q.shape[1], spec,
        )  # fmt: skip
        yield call, of_q, of_k, of_row, b


def attention_fwd(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right,
                  dropout_p, out):  # fmt: skip
    """As kernels.attention.attention_fwd. The statistics are the row maxima and natural logs of the sums."""
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[1], q.shape[0]) if cu_q is not None else q.shape[:3]
    lse = q.new_full(shape, -torch.inf, dtype=wide)
    stats = q.new_zeros((2, *shape), dtype=wide)
    stats[1] = torch.inf
    spec = (scale, softcap, left, right, bottom_right, dropout_p)
    if out.numel() or lse.numel():
        for call, of_q, _, of_row, _ in _sequences(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, spec):
            call.forward(of_q(out), of_row(lse), of_row(stats))
    return lse, stats


def attention_bwd(dout, dlse, q, k, v, out, stats, bias, sinks, slopes, seed, cu_q, cu_k, scale, softcap, left,
                  right, bottom_right, dropout_p, grads):  # fmt: skip
    """As kernels.attention_bwd.attention_bwd."""
    dq, dk, dv, need_dbias, need_dsinks = grads
    wide = torch.promote_types(q.dtype, torch.float32)
    dbias = torch.zeros(bias.shape, dtype=wide, device=q.device) if need_dbias else None
    dsinks = torch.zeros(sinks.shape, dtype=wide, device=q.device) if need_dsinks else None
    for grad in (dq, dk, dv):
        if grad is not None and (cu_q is not None or not dout.numel()):
            grad.zero_()
    spec = (scale, softcap, left, right, bottom_right, dropout_p)
    for call, of_q, of_k, of_row, b in _sequences(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, spec):
        call.backward(
            of_q(dout), None if dlse is None else of_row(dlse), of_q(out), of_row(stats),
            *(None if x is None else of(x) for x, of in ((dq, of_q), (dk, of_k), (dv, of_k))),
            None if dbias is None else (
                dbias if cu_q is None else sequence_bias(dbias, b, call.rows, call.cols)
            ),
            dsinks,
        )  # fmt: skip
    return (
        None if dbias is None else dbias.to(bias.dtype),
        None if dsinks is None else dsinks.to(sinks.dtype),
    )
