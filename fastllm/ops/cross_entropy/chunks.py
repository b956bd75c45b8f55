"""linear_cross_entropy's computation: the logits of some rows at a time, never of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import extension
from ...backends import chosen_backend
from ...cpu import multiplies
from .linear_reference import keeps_wide
from .native import rows as cross_entropy_rows


class Upstream(NamedTuple):
    """What each row's loss, lse and entropy count in the gradient, (N,) each; None for one that does not.

    Without a factor there is no gradient at all.
    """

    factor: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    dentropy: torch.Tensor | None = None

    def of(self, at) -> Upstream:
        return Upstream(*(None if t is None else t[at] for t in self))


@dataclass(frozen=True)
class Rows:
    """The loss of single rows: all of cross_entropy's options that do not concern the reduction."""

    ignore_index: int
    smoothing: float
    softcap: float | None
    scale: float
    z_loss: float

    def eager(self, z, y, weight, upstream: Upstream, wanted):
        """(loss, lse, accuracy, entropy) of the logits ``z`` (rows, V), at least fp32; they are overwritten.

        With the gradient for ``upstream``, where that has a factor. None for accuracy or entropy not ``wanted``.
        """
        factor, dlse, dentropy = upstream
        n_classes = z.shape[1]
        keep = y != self.ignore_index
        index = torch.where(keep, y, 0).unsqueeze(1)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            slope_of_cap = (1 - z.square()) if factor is not None else None
            z.mul_(self.softcap)
        top, own = z.amax(1), z.gather(1, index).squeeze(1)
        accuracy = (keep & (own >= top)).to(z.dtype) if wanted[0] else None
        # log p itself only where it is summed; else p at once, which saves a pass.
        logs = self.smoothing != 0.0 or wanted[1]
        (torch.log_softmax if logs else torch.softmax)(z, 1, out=z)
        rel = -z.amax(1) if logs else _log_sum(z, index, own - top)
        lse = top + rel
        mass = keep.to(z.dtype) if weight is None else weight[index.squeeze(1)].to(z.dtype) * keep
        loss = mass * (rel + (top - own))
        slope = mass
        if self.smoothing != 0.0:
            spread = z.sum(1) if weight is None else z @ weight.to(z.dtype)
            share = self.smoothing / n_classes
            loss = (1 - self.smoothing) * loss - share * spread
            slope = (1 - self.smoothing) * mass + share * (n_classes if weight is None else weight.sum().to(z.dtype))
        if self.z_loss != 0.0:
            loss = loss + self.z_loss * mass * lse.square()
            slope = slope + 2 * self.z_loss * mass * lse
        loss = torch.where(keep, loss, 0)
        entropy = tilt = None
        if wanted[1]:
            p = z.exp()
            entropy = torch.special.entr(p, out=p).sum(1)
            if dentropy is not None:
                torch.add(z, entropy.unsqueeze(1), out=p)
                tilt = p.masked_fill_(z == -math.inf, 0).mul_(-dentropy.unsqueeze(1))
        if factor is None:
            return loss, lse, accuracy, entropy
        factor = torch.where(keep, factor, 0)
        along = factor * slope if dlse is None else factor * slope + dlse
        along = torch.where(along == 0, 0, along).unsqueeze(1)
        (z.exp_() if logs else z).mul_(along if tilt is None else tilt.add_(along))
        z.scatter_add_(1, index, (-(1 - self.smoothing) * factor * mass).unsqueeze(1))
        if self.smoothing != 0.0:
            ones = z.new_ones(n_classes) if weight is None else weight.to(z.dtype)
            z.addr_(factor, ones, alpha=-share)
        if self.softcap is not None:
            z.mul_(slope_of_cap)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return loss, lse, accuracy, entropy

    def fused(self, z, y, weight, upstream: Upstream, wanted):
        """The same by the kernels, on logits of any dtype that they take."""
        from ...kernels.cross_entropy.backward import cross_entropy_bwd
        from ...kernels.cross_entropy.forward import forward_rows

        factor, dlse, dentropy = upstream
        options = (self.ignore_index, self.smoothing, self.softcap, self.scale, self.z_loss)
        x = z.unsqueeze(-1)
        loss, lse = z.new_empty(len(z), dtype=torch.float32), z.new_empty(len(z), dtype=torch.float32)
        hits, entropy = (z.new_empty(len(z), dtype=torch.float32) if want else None for want in wanted)
        stats = z.new_empty((3, len(z)), dtype=torch.float32)
        at_once = factor is not None and dlse is None and dentropy is None
        dx = x if at_once else None
        forward_rows(x, y, weight, None, factor, loss, lse, stats, hits, entropy, dx, *options, mean=False)
        if factor is not None and not at_once:
            cross_entropy_bwd(
                factor, dlse, x, y, weight, stats, None, *options, "none", (True, False), out=x,
                dentropy=dentropy, entropy=entropy,
            )  # fmt: skip
        return loss, lse, hits, entropy

    def native(self, z, y, weight, upstream: Upstream, wanted):
        """The same by the extension, on CPU logits of any dtype."""
        options = (self.ignore_index, self.smoothing, self.softcap, self.scale, self.z_loss)
        loss, lse, hits, entropy = cross_entropy_rows(
            z, y, weight, *options, **upstream._asdict(), dx=None if upstream.factor is None else z,
            accuracy=wanted[0], entropy=wanted[1],
        )  # fmt: skip
        return loss, lse, hits if wanted[0] else None, entropy if wanted[1] else None

    def of_backend(self, name: str):
        """The form that a backend has."""
        return {"eager": self.eager, "triton": self.fused, "native": self.native}[name]


def _log_sum(p, index, below):
    """log sum exp(z - top) of each row of p = softmax(z), where ``below`` is z - top at ``index``."""
    # The largest p is 1 / sum. Any other is exp(below) / sum, which spares a pass over p while neither is near 0; to
    # know that, a GPU's host would have to wait.
    if not p.is_cuda and bool((below > -70).all()):
        return (below.exp() / p.gather(1, index).squeeze(1)).log_()
    return -p.amax(1).log_()


def counting_rows(y, ignore_index: int, compact: int):
    """The rows whose loss is computed, or None for all: see :func:`in_chunks`."""
    if compact == 0:
        return None
    keep = y != ignore_index
    if compact > 0 and y.is_cuda:
        # Which rows they are need not be known here: those that count come first, and the host does not wait.
        torch._assert_async(keep.sum() <= compact, "linear_cross_entropy: more targets count than max_targets")
        return torch.argsort((~keep).to(torch.uint8), stable=True)[:compact]
    index = keep.nonzero().squeeze(1)
    if 0 < compact < len(index):
        raise ValueError(f"linear_cross_entropy: {len(index)} targets count, more than max_targets {compact}")
    return None if len(index) == len(y) and not y.is_cuda else index


def in_chunks(
    x, linear_weight, linear_bias, y, weight, upstream: Upstream, rows: Rows, chunk: int, backend: str, compact: int,
    needs, wanted,
):  # fmt: skip
    """(loss, lse, accuracy, entropy, dx, dlinear_weight, dlinear_bias), ``chunk`` rows of logits at a time.

    The first four are (N,) in at least fp32; accuracy and entropy None where not ``wanted``. Gradients only where
    ``upstream`` has a factor and ``needs`` asks, else None; the linear layer's are summed over the chunks in at least
    fp32 and returned so. ``compact``: 0 computes every row; -1 those that count, which the host must wait to know on
    CUDA; n > 0 the at most n that count. Rows left out have 0 everywhere, lse too.
    """
    n, n_classes = x.shape[0], linear_weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    need_dx, need_dw, need_db = needs if upstream.factor is not None else (False, False, False)
    held_rows = [torch.zeros(n, dtype=wide, device=x.device) if want else None for want in (True, True, *wanted)]
    index = counting_rows(y, rows.ignore_index, compact)
    count = n if index is None else len(index)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    blank = torch.empty if count else torch.zeros  # the first chunk overwrites it
    dw = blank(linear_weight.shape, dtype=wide, device=x.device) if need_dw else None
    db = torch.zeros(n_classes, dtype=wide, device=x.device) if need_db else None
    logits = x.new_empty(min(chunk, count), n_classes)
    held = logits.to(wide) if keeps_wide(x.dtype, backend) else logits
    one = rows.of_backend(backend)
    # Autocast would narrow the fp32 sums again.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            at = slice(start, stop) if index is None else index[start:stop]
            xc = x[at]
            z, mine = logits[: stop - start], held[: stop - start]
            _logits(xc, linear_weight, linear_bias, z)
            if mine.dtype != z.dtype:
                mine.copy_(z)
            for whole, part in zip(held_rows, one(mine, y[at], weight, upstream.of(at), wanted), strict=True):
                if whole is not None:
                    whole[at] = part
            if need_dw:
                _add_product(dw, mine, xc, backend, first=start == 0)
            if need_db:
                db += mine.sum(0, dtype=wide)
            if need_dx:
                if mine.dtype != z.dtype:
                    z.copy_(mine)
                if index is None:
                    _rows_gradient(z, linear_weight, dx[at])
                else:
                    dx.index_copy_(0, at, _rows_gradient(z, linear_weight, torch.empty_like(xc)))
    return *held_rows, dx, dw, db


def _multiplies(x: torch.Tensor) -> bool:
    """Whether the device has products of ``x``'s dtype; else they are taken in fp32, WIDENED classes at a time.

    At 1024 x 256 x 4096, forward and backward, that is 0.25 of their time in bf16 and 0.3 in fp16 (two cores, AVX2).
    """
    return x.device.type != "cpu" or multiplies(x.dtype)


def _logits(x, weight, bias, out):
    """``out`` (rows, V) = x @ weight.T + bias, of one dtype."""
    if _multiplies(x):
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    x = x.float()
    for start in range(0, len(weight), WIDENED):
        at = slice(start, start + WIDENED)
        part = torch.mm(x, weight[at].float().t())
        out[:, at] = part if bias is None else part.add_(bias[at])
    return out


def _rows_gradient(dz, weight, out):
    """``out`` (rows, D) = dz @ weight, of one dtype."""
    if _multiplies(dz):
        return torch.mm(dz, weight, out=out)
    total = torch.zeros(out.shape, dtype=torch.float32)
    for start in range(0, len(weight), WIDENED):
        at = slice(start, start + WIDENED)
        total.addmm_(dz[:, at].float(), weight[at].float())
    return out.copy_(total)


def _product_fake(total, a, b):
    return None


_add_bf16_product = extension.operator("add_product_", _product_fake)
# Columns of ``a``, or classes, that are widened at once where products of 16-bit operands are taken in fp32.
WIDENED = 2048


def _add_product(total, a, b, backend: str, first: bool) -> None:
    """``total += a.T @ b``, summed in total's dtype."""
    narrow = a.dtype == b.dtype != total.dtype
    if backend == "native" and narrow and a.dtype == torch.bfloat16 and extension.bf16_products() != "none":
        if first:
            total.zero_()
        _add_bf16_product(total, a, b if b.stride(1) == 1 else b.contiguous())
    elif narrow and a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        # PyTorch's CPU matmuls sum 16-bit operands into 16 bits, which would cost dW its precision over many chunks.
        b = b.to(total.dtype)
        step = max(1, a.shape[1] if a.dtype == total.dtype else WIDENED)
        for part, columns in zip(total.split(step), a.split(step, 1), strict=True):
            torch.addmm(part, columns.to(total.dtype).t(), b, beta=0 if first else 1, out=part)


def products_exception(device_type: str) -> str | None:
    """What ``info`` says of the products that sum the layer's gradient."""
    if device_type != "cpu" or chosen_backend() == "eager" or extension.missing() is not None:
        return None
    units = extension.bf16_products()
    if units == "none":
        return "bfloat16: the layer's gradient by PyTorch's products in fp32, for this CPU has none of bfloat16"
    return f"bfloat16: the layer's gradient by the extension's products, on {units}"
