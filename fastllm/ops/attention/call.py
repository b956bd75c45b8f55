"""A call of attention as one value, its parts, and the checks of what the public functions are given.

The normal form, which the operators and backends take, has query (B, H, Sq, D), key (B, Hkv, Sk, D) and value
(B, Hkv, Sk, Dv), or packed (total, H, D) with both cu_seqlens. The bias is bool or floating, of four dimensions, each
full or 1. The window is given as its left and right distance from the diagonal, -1 where it is unbounded. With
``bottom_right`` the diagonal ends in the last row and column; otherwise it starts in the first. A causal edge has the
right distance 0.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch._C._functorch import is_functionaltensor

from ..shared.autograd import autocasted
from ..shared.check import check_dense, check_floating, check_length, is_floating, is_number


class AttentionCall(NamedTuple):
    """One call in normal form. The field ``seed`` is None where nothing is dropped, or where PyTorch draws the mask."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    left: int = -1
    right: int = -1
    bottom_right: bool = True
    dropout_p: float = 0.0

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those whose device and dtypes decide which backend serves."""
        return self.q, self.k, self.v, self.sinks

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    @property
    def square(self) -> bool:
        """Whether there are as many rows as columns, so that both diagonals are one."""
        return self.q.shape[-2] == self.k.shape[-2]

    @property
    def causal(self) -> bool:
        return self.right == 0

    def sizes(self) -> tuple[int, int, int, int]:
        """(heads of the query, heads of the key, rows, columns); packed: rows and columns of all sequences."""
        if self.packed:
            return self.q.shape[1], self.k.shape[1], self.q.shape[0], self.k.shape[0]
        return self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]


class TorchArguments(NamedTuple):
    """The arguments of torch.nn.functional.scaled_dot_product_attention, in its order, as they were given."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


class AttentionForm(NamedTuple):
    """``name``: AMX, STEP, TORCH, WIDENED or CHUNKS.

    ``as_given``: PyTorch's operator takes the arguments as they came.
    """

    name: str
    why: str
    as_given: bool = False


class AttentionRequest(NamedTuple):
    """What picks a backend looks at: the call, and what the public function that took it adds.

    ``given``: scaled_dot_product_attention's own arguments, which PyTorch's operator may take as they are, and
    ``leading``: the dimensions that its output has before the last two. ``attention`` has neither. ``form``: the form
    in which eager would serve the call, where that is known.
    """

    call: AttentionCall
    return_lse: bool = False
    given: TorchArguments | None = None
    leading: tuple[int, ...] = ()
    form: AttentionForm | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.call.tensors()


class Edge(NamedTuple):
    """The options of the operators that have no feature but a causal edge from the top left."""

    scale: float
    causal: bool

    def call_of(self, q, k, v, mask=None) -> AttentionCall:
        return AttentionCall(q, k, v, mask, scale=self.scale, right=0 if self.causal else -1, bottom_right=False)


class ForwardResult(NamedTuple):
    """What the backward takes from the forward: the output and the statistics of its rows."""

    out: torch.Tensor
    stats: torch.Tensor


class OutputGradients(NamedTuple):
    """The incoming gradients of the output and of lse; None where lse was not used."""

    dout: torch.Tensor
    dlse: torch.Tensor | None


class Wanted(NamedTuple):
    """The gradients that a backward shall give: buffers to fill or None; whether bias and sinks have one."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    bias: bool
    sinks: bool


def sequence_call(call: AttentionCall, index: int, at_q: slice, at_k: slice) -> AttentionCall:
    """The sequence ``index`` of a packed call, which holds the rows ``at_q`` and ``at_k``, as a dense call."""
    rows, cols = at_q.stop - at_q.start, at_k.stop - at_k.start
    slopes = call.slopes
    return call._replace(
        q=call.q[at_q].transpose(0, 1).unsqueeze(0),
        k=call.k[at_k].transpose(0, 1).unsqueeze(0),
        v=call.v[at_k].transpose(0, 1).unsqueeze(0),
        bias=None if call.bias is None else sequence_bias(call.bias, index, rows, cols),
        slopes=slopes[index : index + 1] if slopes is not None and slopes.dim() == 2 else slopes,
        cu_q=None,
        cu_k=None,
    )


def sequence_bias(bias: torch.Tensor, index: int, rows: int, cols: int) -> torch.Tensor:
    """The slice of a packed call's bias that belongs to the sequence ``index``."""
    bias = bias if bias.shape[0] == 1 else bias[index : index + 1]
    return bias[:, :, : rows if bias.shape[2] > 1 else 1, : cols if bias.shape[3] > 1 else 1]


def cast_qkv(query, key, value, *others) -> tuple:
    """The arguments as autocast casts them. They stay as they are if query, key or value is not a tensor, which is an
    error."""
    if isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
        return autocasted(query, key, value, *others)
    return query, key, value, *others


def new_by_token(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, of x's shape (B, H, S, D); the heads of one token are side by side in memory."""
    batch, heads, rows, columns = x.shape
    return x.new_empty(batch, rows, heads, columns).transpose(1, 2)


def check_qkv(op: str, query, key, value) -> None:
    """TypeError or ValueError unless the three are floating tensors of one dtype on one device."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(op, name, x)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"{op}: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"{op}: query, key and value must be on one device, got {query.device}, {key.device} and {value.device}"
        )


def check_dropout(op: str, p) -> float:
    """``dropout_p`` as a float. ValueError: it is outside of [0, 1]."""
    if not is_number(p) or not 0 <= p <= 1:
        raise ValueError(f"{op}: dropout_p must lie between 0 and 1, got {p!r}")
    return float(p)


def check_scale(op: str, scale, dim: int) -> float:
    """``scale``, by default 1 / sqrt(dim)."""
    if scale is None:
        return 1.0 / math.sqrt(dim) if dim > 0 else 1.0
    if not is_number(scale) or not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")
    return float(scale)


def check_softcap(op: str, softcap) -> float:
    """``softcap`` as a float, 0 for none. ValueError: it is negative, infinite or no number."""
    if softcap is not None and (not is_number(softcap) or not 0 <= softcap < math.inf):
        raise ValueError(f"{op}: softcap must be a finite number >= 0 (None or 0: none), got {softcap!r}")
    return float(softcap or 0.0)


# A window's side from here on is unbounded: no sequence is that long, and a position plus a side fits 32 bits below it.
UNBOUNDED = 2**30


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
    left, right = (-1 if side >= UNBOUNDED else side for side in (left, right))
    return left, 0 if causal else right


def _same_device(op: str, name: str, x, query) -> None:
    if x.device != query.device:
        raise ValueError(f"{op}: {name} is on {x.device}, query on {query.device}; they must be together")


def numbers_of(cu: torch.Tensor) -> list[int]:
    """A vector's values; one by one within torch.func.functionalize, which gives it no memory to read them from."""
    if not torch.compiler.is_compiling() and is_functionaltensor(cu):
        return [int(one.item()) for one in cu.unbind()]
    return cu.tolist()


def _check_cu(op: str, name: str, cu, rows: tuple[int, int | None], query) -> torch.Tensor:
    """``rows``: how many there are, and how many a sequence may have, where that is known."""
    total, most = rows
    if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64):
        got = str(cu.dtype) if isinstance(cu, torch.Tensor) else type(cu).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, got {got}")
    check_dense(op, name, cu)
    if cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape (sequences + 1,), got {list(cu.shape)}")
    _same_device(op, name, cu, query)
    # The values on a GPU are not read: reading them would wait for it.
    if cu.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu) is torch.Tensor:
        bounds = numbers_of(cu)
        if bounds[0] != 0 or bounds[-1] > total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"{op}: {name} must rise from 0 to at most {total} rows, got {bounds[:4]} ... {bounds[-1]}"
            )
        found = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
        # A bias has room for no more.
        if most is not None and found > most:
            of = name.replace("cu_seqlens", "max_seqlen")
            raise ValueError(f"{op}: {of} is {most}, and {name} has a sequence of {found} rows")
    return cu.contiguous()


def check_attention(op: str, call: AttentionCall, longest: tuple[int | None, int | None]) -> tuple:
    """The bias, sinks, slopes and both cu_seqlens of ``call`` in normal form, or an error that names what is wrong.

    ``longest``: the arguments max_seqlen_q and max_seqlen_k.
    """
    query, key, value, bias, sinks, slopes = call.q, call.k, call.v, call.bias, call.sinks, call.slopes
    cu_q, cu_k = call.cu_q, call.cu_k
    check_qkv(op, query, key, value)
    packed = cu_q is not None or cu_k is not None
    for name, most in zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True):
        if most is not None:
            check_length(op, name, most)
    dims, layout = (
        (3, "(total, heads, dim) with cu_seqlens_q and cu_seqlens_k") if packed else (4, "(batch, heads, length, dim)")
    )
    if not query.dim() == key.dim() == value.dim() == dims:
        raise ValueError(f"{op}: expected {layout}, got {_shapes(call)}")
    heads, heads_kv = query.shape[-2 if packed else 1], key.shape[-2 if packed else 1]
    alike = key.shape == value.shape or key.shape[:-1] == value.shape[:-1]
    if not alike or (not packed and query.shape[0] != key.shape[0]):
        raise ValueError(f"{op}: key and value must agree but for dim, and all in batch; got {_shapes(call)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{op}: query and key must have one head dim, got {_shapes(call)}")
    if (heads_kv == 0 and heads > 0) or (heads_kv > 0 and heads % heads_kv):
        raise ValueError(f"{op}: query's heads must be a multiple of key's, got {heads} and {heads_kv}")
    if packed:
        cu_q, cu_k = _check_packing(op, call, longest)
        batch, (rows, cols) = cu_q.numel() - 1, longest
    else:
        batch, rows, cols = query.shape[0], query.shape[2], key.shape[2]
        if longest != (None, None):
            raise ValueError(f"{op}: max_seqlen_q and max_seqlen_k belong to packed calls, with cu_seqlens")
    if sinks is not None:
        sinks = _check_sinks(op, sinks, heads, query)
    if slopes is not None:
        slopes = _check_slopes(op, slopes, (batch, heads), query)
    if bias is not None:
        bias = _check_bias(op, bias, (batch, heads, rows, cols), query, packed)
    return bias, sinks, slopes, cu_q, cu_k


def _check_sinks(op: str, sinks, heads: int, query) -> torch.Tensor:
    good = isinstance(sinks, torch.Tensor) and is_floating(sinks)
    if not good or tuple(sinks.shape) != (heads,):
        raise ValueError(f"{op}: sinks must be floating, of shape (heads,) = ({heads},), got {_say(sinks)}")
    check_dense(op, "sinks", sinks)
    _same_device(op, "sinks", sinks, query)
    return sinks.contiguous()


def _check_slopes(op: str, slopes, planes: tuple[int, int], query) -> torch.Tensor:
    """``planes``: batch and heads."""
    batch, heads = planes
    good = isinstance(slopes, torch.Tensor) and is_floating(slopes)
    if not good or tuple(slopes.shape) not in ((heads,), planes):
        raise ValueError(
            f"{op}: alibi_slopes must be floating, of shape ({heads},) or ({batch}, {heads}), got {_say(slopes)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes are constants and have no gradient; pass alibi_slopes.detach()")
    check_dense(op, "alibi_slopes", slopes)
    _same_device(op, "alibi_slopes", slopes, query)
    return slopes.to(torch.promote_types(query.dtype, torch.float32))


def _check_packing(op: str, call: AttentionCall, longest) -> tuple[torch.Tensor, torch.Tensor]:
    """Both cu_seqlens, of one dtype."""
    most_q, most_k = longest
    cu_q, cu_k = call.cu_q, call.cu_k
    if cu_q is None or cu_k is None:
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must be given together")
    cu_q = _check_cu(op, "cu_seqlens_q", cu_q, (call.q.shape[0], most_q), call.q)
    cu_k = _check_cu(op, "cu_seqlens_k", cu_k, (call.k.shape[0], most_k), call.q)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must name as many sequences, got "
            f"{cu_q.numel() - 1} and {cu_k.numel() - 1}"
        )
    return (cu_q, cu_k) if cu_q.dtype == cu_k.dtype else (cu_q.long(), cu_k.long())


def _shapes(call: AttentionCall) -> str:
    return f"query {list(call.q.shape)}, key {list(call.k.shape)}, value {list(call.v.shape)}"


def _say(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def _check_bias(op: str, bias, full, query, packed: bool) -> torch.Tensor:
    if not isinstance(bias, torch.Tensor) or not (bias.dtype == torch.bool or is_floating(bias)):
        raise TypeError(f"{op}: bias must be a boolean or floating-point tensor, got {_say(bias)}")
    check_dense(op, "bias", bias)
    _same_device(op, "bias", bias, query)
    if packed and None in full:
        raise ValueError(f"{op}: a bias with packed sequences needs max_seqlen_q and max_seqlen_k")
    if bias.dim() > 4 or any(
        size not in (1, want) for size, want in zip(reversed(bias.shape), reversed(full), strict=False)
    ):
        raise ValueError(f"{op}: bias must broadcast to {list(full)}, got shape {list(bias.shape)}")
    return bias[(None,) * (4 - bias.dim())]
