"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34) of queries and keys in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import extension
from ..backends import pick, under_transform
from ..registry import Cost, Op, Sample, define, register
from .shared.autograd import apply, frozen
from .shared.check import beyond_float32, check_dense, check_floating, check_integer
from .shared.stand_ins import any_stands_in, overridden


def _rows(query, cos, sin, position_ids, offset: int):
    """The tables' rows of each position, (S, half), or (1 or B, 1, S, half) beside a query (B, H, S, D)."""
    if position_ids is None:
        found = [t[..., offset : offset + query.shape[-2], :] for t in (cos, sin)]
    else:
        # A negative id would count from the end; past the end it is an error.
        ids = torch.where(position_ids < 0, cos.shape[0], position_ids)
        found = [t.index_select(0, ids.reshape(-1)).view(*ids.shape, t.shape[-1]) for t in (cos, sin)]
    if found[0].dim() == 2:
        return found
    return [t.squeeze(0) if query.dim() == 3 else t.unsqueeze(1) for t in found]


def _turned(x, cos, sin, interleaved: bool):
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].to(wide)
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.split(half, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    y = y.to(x.dtype)
    return y if 2 * half == x.shape[-1] else torch.cat((y, x[..., 2 * half :]), -1)


def rotary_embedding_reference(query, key, cos, sin, *, position_ids=None, offset=0, interleaved=False):
    """The definition, in at least fp32, rounded once."""
    cos, sin = _rows(query, cos, sin, position_ids, offset)
    return tuple(None if x is None else _turned(x, cos, sin, interleaved) for x in (query, key))


class RotaryCall(NamedTuple):
    """A call of the op, in the order of the operator's arguments. ``inverse``: turn the other way."""

    query: torch.Tensor
    key: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    offset: int
    interleaved: bool
    inverse: bool = False

    def tensors(self):
        return self.query, self.key, self.cos, self.sin

    def by_torch(self):
        """The rotated query and key, by PyTorch's own operators."""
        return rotary_embedding_reference(
            self.query,
            self.key,
            self.cos,
            -self.sin if self.inverse else self.sin,
            position_ids=self.position_ids,
            offset=self.offset,
            interleaved=self.interleaved,
        )


_SCHEMA = (
    "rotary(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? position_ids, int offset, bool interleaved,"
    " bool inverse) -> (Tensor, Tensor)"
)


def _rotated_like(x: torch.Tensor) -> torch.Tensor:
    """A new tensor as ``x`` (B, H, S, D) with heads or positions further out, as they are there."""
    if x.stride(1) < x.stride(2):
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
    return x.new_empty(x.shape)


def _fake(query, key, *options):
    return _rotated_like(query), query.new_empty(0) if key is None else _rotated_like(key)


def _unknown(position_ids, rows: int) -> IndexError | None:
    """An error that names the first id that is not a row of the tables, or None."""
    bad = (position_ids < 0) | (position_ids >= rows)
    if not bad.any():
        return None
    at = bad.nonzero()[0].tolist()
    return IndexError(
        f"rotary_embedding: position_ids {position_ids[tuple(at)].item()} at {at} is out of range: expected a row of "
        f"cos, in [0, {rows})"
    )


@define(_SCHEMA, _fake)
def _rotary(*args):
    from ..kernels.rotary_embedding import rotary

    call = RotaryCall(*args)
    if call.position_ids is not None and call.position_ids.device.type == "cpu":
        error = _unknown(call.position_ids, call.cos.shape[0])
        if error is not None:
            raise error
    if call.cos.dim() == 3:  # of one sequence for all
        call = call._replace(**{name: getattr(call, name).expand(len(call.query), -1, -1) for name in ("cos", "sin")})
    outs = _fake(*call)
    rotary(call, *outs)
    return outs


# On a CPU, by csrc/cpu/rotary.cpp.
rotary_rows = extension.operator("rotary_rows", _fake)


class _Turn(NamedTuple):
    """What turns: the tables, the options and the backend, which have no gradient."""

    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    offset: int
    interleaved: bool
    inverse: bool
    backend: str

    def __call__(self, query, key):
        operator = rotary_rows if self.backend == "native" else _rotary
        return operator(query, key, *self[:-1])


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(query, key, turn):
        return turn(query, key)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, turn = inputs
        query_out, key_out = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*frozen(query_out, (query,)), *frozen(key_out, (key,)))
        ctx.save_for_backward(turn.cos, turn.sin, turn.position_ids)
        ctx.options = turn.offset, turn.interleaved, not turn.inverse, turn.backend

    @staticmethod
    def backward(ctx, dquery, dkey):
        given = [g if need else None for g, need in zip((dquery, dkey), ctx.needs_input_grad[:2], strict=True)]
        present = [g for g in given if g is not None]
        if present:
            back = _Turn(*ctx.saved_tensors, *ctx.options)
            first, second = present[0], present[1] if len(present) == 2 else None
            if under_transform():
                turned = RotaryCall(first, second, *back[:-1]).by_torch()
            elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # A rotation's gradient is a rotation, and so to any order.
                turned = apply(_Rotary, first, second, back)
            else:
                turned = back(first, second)
            present = list(turned[: len(present)])
        return *(None if g is None else present.pop(0) for g in given), None


def _call(query, key, cos, sin, *, position_ids=None, offset=0, interleaved=False) -> RotaryCall:
    _check(query, key, cos, sin, position_ids, offset)
    return RotaryCall(query, key, cos, sin, position_ids, offset=int(offset), interleaved=bool(interleaved))


def _batch(query: torch.Tensor) -> int:
    return query.shape[0] if query.dim() == 4 else 1


def _check(query, key, cos, sin, position_ids, offset) -> None:
    op = "rotary_embedding"
    check_integer(op, "offset", offset)
    for name, tensor in dict(query=query, key=key, cos=cos, sin=sin).items():
        if name == "key" and key is None:
            continue
        check_floating(op, name, tensor)
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, query on {query.device}; they must be together")
    if query.dim() not in (3, 4):
        raise ValueError(f"{op}: query must be (B, H, S, D) or (H, S, D), got shape {list(query.shape)}")
    if key is not None and (
        key.dim() != query.dim() or key.shape[:-3] != query.shape[:-3] or key.shape[-2:] != query.shape[-2:]
    ):
        raise ValueError(
            f"{op}: key must have query's shape {list(query.shape)} but for the number of heads, got {list(key.shape)}"
        )
    batch, length, width = _batch(query), query.shape[-2], query.shape[-1]
    if cos.dim() not in (2, 3) or cos.shape != sin.shape:
        raise ValueError(
            f"{op}: cos and sin must be alike, (P, rotated / 2) or (B, P, rotated / 2), got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if cos.dim() == 3 and cos.shape[0] not in (1, batch):
        raise ValueError(f"{op}: cos and sin must have the batch size {batch} or 1, got {cos.shape[0]}")
    if not 0 < 2 * cos.shape[-1] <= width:
        raise ValueError(
            f"{op}: cos and sin hold one number for each pair of rotated features, at most {width // 2} of query's "
            f"{width} features, got {cos.shape[-1]}"
        )
    if position_ids is not None:
        _check_position_ids(position_ids, query, cos, offset)
    elif not 0 <= offset <= cos.shape[-2] - length:
        raise ValueError(
            f"{op}: query's {length} positions from offset {offset} need rows {offset} to {offset + length - 1} of "
            f"cos and sin, which have {cos.shape[-2]} rows"
        )


def _check_position_ids(position_ids, query, cos, offset) -> None:
    op, batch, length = "rotary_embedding", _batch(query), query.shape[-2]
    if not isinstance(position_ids, torch.Tensor) or position_ids.dtype not in (torch.int64, torch.int32):
        got = str(position_ids.dtype) if isinstance(position_ids, torch.Tensor) else type(position_ids).__name__
        raise TypeError(f"{op}: position_ids must be int64 or int32, got {got}")
    check_dense(op, "position_ids", position_ids)
    if tuple(position_ids.shape) not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"{op}: position_ids must be of shape {[length]} or {[batch, length]}, got {list(position_ids.shape)}"
        )
    if position_ids.device != query.device:
        raise ValueError(f"{op}: position_ids is on {position_ids.device}, query on {query.device}; keep them together")
    if offset != 0 or cos.dim() != 2:
        raise ValueError(f"{op}: position_ids are rows of 2-D cos and sin, without an offset")


def _refuses(backend: str, call: RotaryCall) -> str | None:
    if backend == "eager":
        return None
    if backend == "native" and (reason := beyond_float32(call.tensors())) is not None:
        return reason
    if call.cos.requires_grad or call.sin.requires_grad:
        return "the kernel gives no gradient for cos and sin, and they require one"
    return None


def _prefers_torch(call: RotaryCall) -> str | None:
    if call.query.device.type != "cpu":
        return None
    if torch.compiler.is_compiling():
        return "torch.compile makes one loop of PyTorch's operators"
    return _refuses("native", call)


def rotary_embedding(query, key, cos, sin, *, position_ids=None, offset=0, interleaved=False):
    """Rotate pairs of features of queries and keys by the angles of their positions, out of place, both in one pass.

    Args:
        query: (B, H, S, D) or (H, S, D), floating point, any strides: a view of a packed projection is read in place.
        key: the same, with its own H, or None.
        cos, sin: cosines and sines of the angles, (P, R / 2), or (B, P, R / 2) if they differ by sequence; floating
            point (fp32 keeps large positions exact), any strides. The first R of the D features are rotated, R <= D,
            the others copied. Of tables (S, R) that repeat each angle, pass one half: ``cos[..., : R // 2]`` for
            halves, ``cos[..., ::2]`` where interleaved.
        position_ids: the tables' row of each position, (S,) or (B, S), int64 or int32; None for rows ``offset`` to
            ``offset + S``. For packed sequences, and batches that begin at different positions.
        interleaved: pairs are features (2 i, 2 i + 1), as in the paper and GPT-J; else (i, i + R / 2), as in GPT-NeoX
            and Llama.

    Returns:
        (query, key), new tensors of the same shapes and dtypes; None for a key of None. Computed in fp32 at least,
        rounded once.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or positions leave the tables.
        IndexError: on CPU, a position id is not a row of the tables. On CUDA a device-side assert.
        BackendError: the backend asked for cannot serve the call; the kernel has no gradient for cos and sin.
    """
    if any_stands_in(query, key, cos, sin, position_ids):
        return overridden(
            rotary_embedding, query, key, cos, sin, position_ids=position_ids, offset=offset, interleaved=interleaved
        )
    call = _call(query, key, cos, sin, position_ids=position_ids, offset=offset, interleaved=interleaved)
    backend = pick("rotary_embedding", call).backend
    if backend == "eager":
        if position_ids is None or torch.compiler.is_compiling():
            return call.by_torch()
        try:
            return call.by_torch()
        except IndexError:
            error = _unknown(position_ids, cos.shape[0])
            if error is None:
                raise
            raise error from None
    batched = query.dim() == 4
    whole = [x if batched or x is None else x.unsqueeze(0) for x in (query, key)]
    turned = apply(_Rotary, *whole, _Turn(*call[2:], backend))
    turned = turned if batched else [y.squeeze(0) for y in turned]
    return turned[0], None if key is None else turned[1]


def _samples(device, dtype):
    def make(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def tables(*shape, dtype=torch.float32):
        angles = torch.rand(shape, device=device) * 20
        return angles.cos().to(dtype), angles.sin().to(dtype)

    yield Sample("halves", (make(2, 3, 7, 16), make(2, 3, 7, 16), *tables(7, 8)))
    yield Sample("interleaved", (make(2, 3, 7, 16), make(2, 3, 7, 16), *tables(7, 8)), dict(interleaved=True))
    yield Sample("grouped_partial", (make(2, 4, 5, 20), make(2, 1, 5, 20), *tables(5, 6)))
    packed = make(2, 5, 6, 12)
    yield Sample(
        "packed_projection",
        (*(t.transpose(1, 2) for t in packed.split((4, 2), 2)), *tables(9, 3)),
        dict(offset=4, interleaved=True),
    )
    yield Sample("query_alone", (make(1, 2, 40, 6), None, *tables(40, 3)))
    yield Sample("no_batch", (make(3, 5, 8), make(1, 5, 8), *tables(5, 4)))
    yield Sample("by_sequence", (make(2, 2, 4, 8), make(2, 2, 4, 8), *tables(2, 6, 4, dtype=dtype)), dict(offset=1))
    ids = torch.tensor([[0, 1, 2, 0, 1], [3, 8, 8, 4, 5]], device=device)
    yield Sample("position_ids", (make(2, 2, 5, 8), make(2, 2, 5, 8), *tables(9, 4)), dict(position_ids=ids))
    yield Sample(
        "shared_ids", (make(2, 2, 5, 8), make(2, 2, 5, 8), *tables(9, 4)), dict(position_ids=ids[1].int())
    )  # fmt: skip
    repeated = [t.repeat_interleave(2, -1)[..., ::2] for t in tables(6, 5)]
    yield Sample("strided", (make(6, 2, 2, 10).permute(1, 2, 0, 3), make(2, 2, 10, 6).mT, *repeated))
    yield Sample("frozen_query", (make(1, 2, 4, 8).detach(), make(1, 2, 4, 8), *tables(4, 4)))
    yield Sample("frozen_key", (make(1, 2, 4, 8), make(1, 2, 4, 8).detach(), *tables(4, 4)))
    yield Sample("no_positions", (make(2, 2, 0, 8), make(2, 2, 0, 8), *tables(4, 4)))


def _examples(device):
    for name, dtype in (("float32", torch.float32), ("16 bits", torch.bfloat16), ("float64", torch.float64)):
        one = torch.empty(1, device=device, dtype=dtype)
        tables = [one.expand(4, 8).float() for _ in range(2)]
        yield Sample(name, (one.expand(1, 2, 4, 16), None, *tables))
    yield Sample("learned tables", (one.float().expand(1, 2, 4, 16), None, *(t.requires_grad_() for t in tables)))


def _cost(query, key, cos, sin, *, position_ids=None, **options) -> Cost:
    """Both in and out, and the tables' rows in; the same again for the gradients that are wanted."""
    size = {id(x): x.numel() * x.element_size() for x in (query, key) if x is not None}
    rows = query.shape[-2] if position_ids is None else position_ids.numel()
    tables = 2 * cos.numel() // max(cos.shape[-2], 1) * rows * cos.element_size()
    ids = 0 if position_ids is None else position_ids.numel() * position_ids.element_size()
    wanted = sum(size[id(x)] for x in (query, key) if x is not None and x.requires_grad)
    return Cost(2 * sum(size.values()) + tables + ids, 2 * wanted + tables + ids)


register(
    Op(
        name="rotary_embedding",
        summary="rotary positions on queries and keys in one pass; halves or interleaved, partial, by position id",
        function=rotary_embedding,
        reference=rotary_embedding_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager", "triton", "native"),
        call=_call,
        refuses=_refuses,
        prefers_torch=_prefers_torch,
        examples=_examples,
    )
)
