"""Behind linear_cross_entropy: checks, plan, the chunked computation (logits of some rows, never of all), samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..registry import Cost, Sample

DEFAULT_WORKSPACE_MB = {"cuda": 1200.0, "cpu": 64.0}


@dataclass(frozen=True)
class Plan:
    """How a call will run: ``rows`` of logits at a time in ``chunks`` turns, ``workspace_bytes`` beside the gradients.

    ``lane`` says what the gradients cost: "3 matmuls, no recompute" computes them with the loss; "4 matmuls, recompute"
    keeps nothing and computes the logits again in the backward; "1 matmul, loss only" where nothing needs a gradient.
    """

    rows: int
    chunks: int
    workspace_bytes: int
    lane: str

    def __str__(self):
        mib = self.workspace_bytes / 2**20
        return f"{self.chunks} chunks of {self.rows} rows, {mib:.1f} MiB of workspace, {self.lane}"


def check_whole(input, linear_weight, target, linear_bias, ignore_index, token_weight, shift):
    """For class probabilities and weights of more than two dimensions; cross_entropy checks the rest."""
    op = "linear_cross_entropy"
    if not isinstance(input, torch.Tensor) or not input.is_floating_point() or not linear_weight.is_floating_point():
        raise TypeError(f"{op}: input and linear_weight must be floating-point tensors")
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{op}: input must be (N, D) or (D,) and linear_weight (V, ..., D) here, got {list(input.shape)} and "
            f"{list(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(f"{op}: a linear_weight of shape {list(linear_weight.shape)} needs an input (N, D)")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"{op}: linear_bias must be of shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}"
        )
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError(f"{op}: ignore_index is for class indices, got {ignore_index} with class probabilities")
    if token_weight is not None or shift:
        raise ValueError(f"{op}: token_weight and shift are for class indices and a linear_weight (V, D)")


def check_linear(input, linear_weight, target, linear_bias, token_weight, shift, max_workspace_mb):
    op = "linear_cross_entropy"
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        got = str(target.dtype) if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must hold class indices, int64 or uint8, got {got}")
    if linear_weight.dim() != 2 or 0 in linear_weight.shape:
        raise ValueError(f"{op}: linear_weight must be (classes, features), got shape {list(linear_weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"{op}: input must end in linear_weight's {linear_weight.shape[1]} features, got shape {list(input.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{op}: target must be of shape {list(input.shape[:-1])}, got {list(target.shape)}")
    if linear_bias is not None and tuple(linear_bias.shape) != (linear_weight.shape[0],):
        raise ValueError(
            f"{op}: linear_bias must be of shape [{linear_weight.shape[0]}], got {list(linear_bias.shape)}"
        )
    if token_weight is not None:
        if tuple(token_weight.shape) != tuple(target.shape):
            raise ValueError(
                f"{op}: token_weight must be of the target's shape {list(target.shape)}, got {list(token_weight.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(f"{op}: token_weight gets no gradient; multiply the losses of reduction='none' instead")
    others = dict(linear_weight=linear_weight, target=target, linear_bias=linear_bias, token_weight=token_weight)
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}; they must be together")
    if shift < 0 or (shift and target.dim() == 0):
        raise ValueError(f"{op}: shift must not be negative, and needs a dimension to shift along; got {shift}")
    if max_workspace_mb is not None and not max_workspace_mb > 0:
        raise ValueError(f"{op}: max_workspace_mb must be positive, got {max_workspace_mb}")


def shifted(target, ignore_index: int, shift: int):
    """The target ``shift`` positions on; the last ones have none and are ignored."""
    if shift == 0:
        return target
    rest = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), ignore_index)
    return torch.cat((target[..., shift:], rest), -1)


def is_whole(linear_weight, target) -> bool:
    """Whether the call is of a form that is not computed in chunks."""
    tensors = isinstance(linear_weight, torch.Tensor) and isinstance(target, torch.Tensor)
    return tensors and (target.is_floating_point() or linear_weight.dim() > 2)


def whole_logits(input, linear_weight, linear_bias, dtype):
    """All the logits, (N, C, d1, ...) for a weight (C, d1, ..., D)."""
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(dtype)
    logits = F.linear(input.to(dtype), linear_weight.flatten(0, -2).to(dtype), bias)
    return logits.unflatten(-1, linear_weight.shape[:-1]) if linear_weight.dim() > 2 else logits


def keeps_wide(dtype: torch.dtype, fused: bool) -> bool:
    """Whether a chunk's logits are held once more in fp32: the eager path does so for 16-bit inputs."""
    return not fused and torch.promote_types(dtype, torch.float32) != dtype


def plan(
    tokens: int, vocabulary: int, dtype, device_type: str, fused: bool, max_workspace_mb, softcap, lane: str
) -> Plan:
    size = torch.empty((), dtype=dtype).element_size()
    wide = torch.promote_types(dtype, torch.float32).itemsize
    row = vocabulary * (size + (wide if keeps_wide(dtype, fused) else 0) + (0 if fused or softcap is None else wide))
    budget = (max_workspace_mb or DEFAULT_WORKSPACE_MB.get(device_type, 64.0)) * 2**20
    rows = max(1, min(int(budget // row), tokens))
    if 128 <= rows < tokens:
        rows -= rows % 128  # whole tiles of the matmuls
    chunks = math.ceil(tokens / rows) if tokens else 0
    rows = math.ceil(tokens / chunks) if chunks else rows  # all chunks alike, where that takes no more of them
    return Plan(rows, chunks, rows * row, lane)


@dataclass(frozen=True)
class Rows:
    """The loss of single rows: all of cross_entropy's options that do not concern the reduction."""

    ignore_index: int
    smoothing: float
    softcap: float | None
    scale: float
    z_loss: float

    def eager(self, z, y, weight, factor, dlse):
        """(loss, lse) of the logits ``z`` (rows, V), at least fp32; they are overwritten.

        Where ``factor`` (rows,) is given, with the gradient: ``factor`` times that of the loss plus ``dlse`` times that
        of lse.
        """
        n_classes = z.shape[1]
        keep = y != self.ignore_index
        index = torch.where(keep, y, 0).unsqueeze(1)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            slope_of_cap = (1 - z.square()) if factor is not None else None
            z.mul_(self.softcap)
        top = z.amax(1)
        torch.log_softmax(z, 1, out=z)
        lse = top - z.amax(1)
        mass = keep.to(z.dtype) if weight is None else weight[index.squeeze(1)].to(z.dtype) * keep
        loss = -mass * z.gather(1, index).squeeze(1)
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
        if factor is None:
            return loss, lse
        factor = torch.where(keep, factor, 0)
        along = factor * slope if dlse is None else factor * slope + dlse
        z.exp_().mul_(torch.where(along == 0, 0, along).unsqueeze(1))
        z.scatter_add_(1, index, (-(1 - self.smoothing) * factor * mass).unsqueeze(1))
        if self.smoothing != 0.0:
            ones = z.new_ones(n_classes) if weight is None else weight.to(z.dtype)
            z.addr_(factor, ones, alpha=-share)
        if self.softcap is not None:
            z.mul_(slope_of_cap)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return loss, lse

    def fused(self, z, y, weight, factor, dlse):
        """The same by the kernels, on logits of any dtype that they take."""
        from ..kernels._cross_entropy_backward import cross_entropy_bwd
        from ..kernels.cross_entropy import forward_rows

        options = (self.ignore_index, self.smoothing, self.softcap, self.scale, self.z_loss)
        x = z.unsqueeze(-1)
        loss, lse = z.new_empty(len(z), dtype=torch.float32), z.new_empty(len(z), dtype=torch.float32)
        stats = z.new_empty((3, len(z)), dtype=torch.float32)
        dx = x if factor is not None and dlse is None else None
        forward_rows(x, y, weight, None, factor, loss, lse, stats, dx, *options, mean=False)
        if factor is not None and dlse is not None:
            cross_entropy_bwd(factor, dlse, x, y, weight, stats, None, *options, "none", (True, False), out=x)
        return loss, lse


def in_chunks(
    x, linear_weight, linear_bias, y, weight, factor, dlse, rows: Rows, chunk: int, fused: bool, compact, needs
):
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of ``x`` (N, D), ``chunk`` rows of logits at a time.

    loss and lse are (N,) in at least fp32. Gradients only where ``factor`` (N,) is given and ``needs`` asks, else None;
    the linear layer's are summed over the chunks in at least fp32 and returned so. With ``compact`` ignored rows are
    left out before anything is computed, and lse is 0 there.
    """
    n, n_classes = x.shape[0], linear_weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    need_dx, need_dw, need_db = needs if factor is not None else (False, False, False)
    loss, lse = (torch.zeros(n, dtype=wide, device=x.device) for _ in range(2))
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    dw = torch.zeros(linear_weight.shape, dtype=wide, device=x.device) if need_dw else None
    db = torch.zeros(n_classes, dtype=wide, device=x.device) if need_db else None
    index = (y != rows.ignore_index).nonzero().squeeze(1) if compact else None
    count = n if index is None else len(index)
    logits = x.new_empty(min(chunk, count), n_classes)
    held = logits.to(wide) if keeps_wide(x.dtype, fused) else logits
    # Autocast would narrow the fp32 sums again.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            at = slice(start, stop) if index is None else index[start:stop]
            xc = x[at]
            z, mine = logits[: stop - start], held[: stop - start]
            if linear_bias is None:
                torch.mm(xc, linear_weight.t(), out=z)
            else:
                torch.addmm(linear_bias, xc, linear_weight.t(), out=z)
            if mine.dtype != z.dtype:
                mine.copy_(z)
            one = rows.fused if fused else rows.eager
            loss[at], lse[at] = one(
                mine, y[at], weight, None if factor is None else factor[at], None if dlse is None else dlse[at]
            )
            if need_dw:
                _add_product(dw, mine, xc, first=start == 0)
            if need_db:
                db += mine.sum(0, dtype=wide)
            if need_dx:
                if mine.dtype != z.dtype:
                    z.copy_(mine)
                if index is None:
                    torch.mm(z, linear_weight, out=dx[at])
                else:
                    dx.index_copy_(0, at, z @ linear_weight)
    return loss, lse, dx, dw, db


def _add_product(total, a, b, first: bool) -> None:
    """``total += a.T @ b``, summed in total's dtype."""
    narrow = a.dtype == b.dtype != total.dtype
    if narrow and a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        # PyTorch's CPU matmuls sum 16-bit operands into 16 bits, which would cost dW its precision over many chunks.
        torch.addmm(total, a.t().to(total.dtype), b.to(total.dtype), beta=0 if first else 1, out=total)


def linear_samples(device, dtype):
    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    def classes(n, *shape):
        y = torch.randint(0, n, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < 0.25, -100, y)

    tiny = 1e-4  # MiB: a few rows at a time
    yield Sample("mean", (make(7, 16), make(50, 16, scale=0.3), classes(50, 7)))
    yield Sample(
        "bias_in_chunks", (make(9, 8), make(33, 8), classes(33, 9)), dict(linear_bias=make(33), max_workspace_mb=tiny)
    )
    yield Sample(
        "every_option",
        (make(2, 5, 8), make(21, 8), classes(21, 2, 5)),
        dict(
            linear_bias=make(21), weight=torch.rand(21, device=device).to(dtype), label_smoothing=0.1, softcap=4.0,
            logit_scale=0.7, z_loss=0.05, token_weight=torch.rand(2, 5, device=device), shift=1, return_lse=True,
            max_workspace_mb=tiny,
        ),
    )  # fmt: skip
    yield Sample("none", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="none", max_workspace_mb=tiny))
    yield Sample("sum_recomputed", (make(6, 8), make(21, 8), classes(21, 6)), dict(reduction="sum", recompute=True))
    yield Sample("frozen_body", (make(6, 8).detach(), make(21, 8), classes(21, 6)), dict(z_loss=0.1))
    yield Sample("frozen_head", (make(6, 8), make(21, 8).detach(), classes(21, 6)), dict(label_smoothing=0.2))
    yield Sample("no_rows", (make(0, 8), make(21, 8), classes(21, 0)), dict(reduction="sum"))
    yield Sample("strided", (make(8, 6).t(), make(8, 21).t(), classes(21, 6)), dict(reduction="sum"))
    yield Sample("all_ignored", (make(3, 8), make(21, 8), torch.full((3,), -100, device=device)))


def linear_cost(input, linear_weight, target, *, linear_bias=None, **options) -> Cost:
    """Input, weight and targets in; backward: their gradients out. Three matrix multiplications."""
    moved = sum(t.numel() * t.element_size() for t in (input, linear_weight, linear_bias) if t is not None)
    matmul = 2 * target.numel() * linear_weight.numel()
    wanted = sum(t.requires_grad for t in (input, linear_weight))
    return Cost(moved + 8 * target.numel(), moved, matmul, wanted * matmul)
