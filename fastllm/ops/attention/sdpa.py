"""torch.nn.functional.scaled_dot_product_attention on the kernels of :mod:`fastllm.ops.attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...backends import pick
from ...registry import Op, Sample, register
from ..shared.check import check_dense
from ..shared.philox import draw_seed, first_row_of
from ..shared.stand_ins import any_stands_in, overridden
from .attention import attention_prefers_torch, kernels_refuse
from .call import AttentionCall, AttentionRequest, TorchArguments, cast_qkv, check_dropout, check_qkv, check_scale
from .forms import CHUNKS, attention_by_form, form_of, formed
from .operator import apply_attention
from .ordinary import ordinary_attention
from .reference import reference
from .samples import attention_cost, attention_examples

OP = "scaled_dot_product_attention"


def _got(query, key, value) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def _leading(query, key, value, enable_gqa: bool):
    """The leading dimensions of query, key and value (each with its own heads under GQA), broadcast together."""
    shapes = [x.shape[:-2] for x in (query, key, value)]
    if enable_gqa:
        if min(len(s) for s in shapes) < 1:
            raise ValueError(f"{OP}: enable_gqa needs a dimension of heads, got {_got(query, key, value)}")
        heads = [s[-1] for s in shapes]
        if any(h == 0 or heads[0] % h for h in heads[1:]):
            raise ValueError(
                f"{OP}: under enable_gqa query's heads must be a multiple of key's and value's, got "
                f"{_got(query, key, value)}"
            )
        shapes = [s[:-1] for s in shapes]
    try:
        common = shapes[0] if shapes[0] == shapes[1] == shapes[2] else torch.broadcast_shapes(*shapes)
    except RuntimeError:
        hint = "" if enable_gqa else " (enable_gqa=True repeats key's and value's heads)"
        raise ValueError(f"{OP}: batch dimensions do not broadcast: {_got(query, key, value)}{hint}") from None
    return [(*common, h) for h in heads] if enable_gqa else [common] * 3


def _four(x, leading):
    """``x`` with its leading dimensions broadcast to ``leading``, of any number, and these as two: (B, H, S, D)."""
    shape = (*leading, *x.shape[-2:])
    if len(leading) == 2 and x.shape == shape:
        return x  # A view of it would be one more node of the graph.
    x = x.expand(shape)
    if len(leading) > 2:
        # The product rather than -1, which is ambiguous in an empty tensor.
        return x.reshape(math.prod(leading[:-1]), *shape[-3:])
    return x[(None,) * (2 - len(leading))]


def _mask(attn_mask, query, leading, rows: int, cols: int):
    if attn_mask.dim() < 2:
        raise ValueError(f"{OP}: attn_mask must have at least 2 dimensions, got shape {list(attn_mask.shape)}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"{OP}: attn_mask must be bool, float32 or query's {query.dtype}, got {attn_mask.dtype}")
    check_dense(OP, "attn_mask", attn_mask)
    if attn_mask.device != query.device:
        raise ValueError(f"{OP}: attn_mask is on {attn_mask.device}, query on {query.device}; they must be together")
    full = (*leading, rows, cols)
    fits = attn_mask.dim() <= len(full) and all(
        size in (1, want) for size, want in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{OP}: attn_mask must broadcast to {list(full)}, got shape {list(attn_mask.shape)}")
    if len(leading) > 2:
        return _four(attn_mask, leading)
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def _causal(attn_mask, rows: int, cols: int):
    """``attn_mask``, which broadcasts to (..., rows, cols), with column j > row i hidden too."""
    visible = torch.ones(rows, cols, dtype=torch.bool, device=attn_mask.device).tril()
    return attn_mask & visible if attn_mask.dtype == torch.bool else torch.where(visible, attn_mask, -math.inf)


def _variant(mask) -> str | None:
    """``UPPER_LEFT`` or ``LOWER_RIGHT`` for a CausalBias, None for any other mask."""
    if mask is None or type(mask) in (torch.Tensor, torch.nn.Parameter):
        return None
    # Not at the top: that module takes a second to import, for torch._dynamo and sympy.
    from torch.nn.attention.bias import CausalBias

    return mask.variant.name if isinstance(mask, CausalBias) else None


def sdpa_request(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """The arguments of :func:`scaled_dot_product_attention` as one value, after all checks."""
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"{OP}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
    variant = _variant(attn_mask)
    if attn_mask is None or variant is not None:
        query, key, value = cast_qkv(query, key, value)
    else:
        query, key, value, attn_mask = cast_qkv(query, key, value, attn_mask)
    check_qkv(OP, query, key, value)
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(f"{OP}: query, key and value need at least 2 dimensions, got {_got(query, key, value)}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{OP}: expected query (..., L, E), key (..., S, E), value (..., S, Ev); got {_got(query, key, value)}"
        )
    if variant is not None and is_causal:
        raise ValueError(f"{OP}: attn_mask must not be a CausalBias when is_causal is set")
    given_p, given_scale = dropout_p, scale
    dropout_p = check_dropout(OP, dropout_p)
    scale = check_scale(OP, scale, query.shape[-1])
    rows, cols = query.shape[-2], key.shape[-2]
    leading, of_key, of_value = _leading(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None and variant is not None:
        if tuple(attn_mask.shape[-2:]) != (rows, cols):
            raise ValueError(f"{OP}: attn_mask is for lengths {list(attn_mask.shape)}, got {_got(query, key, value)}")
    elif attn_mask is not None:
        mask = _mask(attn_mask, query, leading, rows, cols)
        if is_causal:
            # Older versions of PyTorch's operator do not take both.
            attn_mask, is_causal = _causal(attn_mask, rows, cols), False
            mask = _mask(attn_mask, query, leading, rows, cols)
    given = TorchArguments(query, key, value, attn_mask, given_p, is_causal, given_scale, enable_gqa)
    # With LOWER_RIGHT the last row sees every column.
    causal = is_causal or variant == "UPPER_LEFT" or (variant == "LOWER_RIGHT" and rows > 1)
    call = AttentionCall(
        _four(query, leading), _four(key, of_key), _four(value, of_value), mask, scale=scale,
        right=0 if causal else -1, bottom_right=variant == "LOWER_RIGHT",
        dropout_p=dropout_p,
    )  # fmt: skip
    return formed(AttentionRequest(call, given=given, leading=tuple(leading)))


def _seeded(call: AttentionCall, first_row: torch.Tensor | None = None) -> AttentionCall:
    """``call`` with the seed of its dropout mask. PyTorch's own operator takes no seed, and none is drawn for it."""
    if call.dropout_p == 0:
        return call
    return call._replace(seed=draw_seed(call.q.device, first_row_of(call.q.shape[:2], first_row)))


def _refuses(backend: str, request: AttentionRequest) -> str | None:
    """Why the attention kernels cannot take a call, or None."""
    k, v = request.call.k, request.call.v
    if backend != "eager" and k.shape[1] != v.shape[1]:
        return f"the kernels take as many heads of the value as of the key, got {v.shape[1]} and {k.shape[1]}"
    return kernels_refuse(backend, request)


def _prefers_torch(request: AttentionRequest) -> str | None:
    """Why PyTorch's own operators serve a call without being asked for, or None."""
    return attention_prefers_torch(request) or (_refuses("native", request) if request.call.q.is_cpu else None)


def scaled_dot_product_attention_reference(*args, **options):
    """The definition, all scores at once, in at least fp32; takes scaled_dot_product_attention's arguments."""
    request = sdpa_request(*args, **options)
    call, leading = request.call, request.leading
    k, v = call.k, call.v
    v = v.repeat_interleave(k.shape[1] // v.shape[1], 1) if v.shape[1] < k.shape[1] else v
    k = k.repeat_interleave(v.shape[1] // k.shape[1], 1) if k.shape[1] < v.shape[1] else k
    out, _ = reference(_seeded(call._replace(k=k, v=v)))
    return out.reshape(*leading, *out.shape[-2:])


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention``, fused.

    Args:
        query: (..., L, E), floating point, any strides; any number of leading dimensions, the last of them heads.
        key, value: (..., S, E) and (..., S, Ev); leading dimensions broadcast with query's.
        attn_mask: broadcasts to (..., L, S): boolean, True for keys that take part, or added to the logits, with a
            gradient; or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability of dropping a softmax weight, always applied.
        is_causal: hide column j > row i (top-left, as torch; :func:`fastllm.functional.attention` is bottom-right),
            beside what ``attn_mask`` hides.
        scale: by default 1 / sqrt(E).
        enable_gqa: key and value may have fewer heads. Consecutive query heads share one.

    Returns:
        (..., L, Ev) in query's dtype. Rows without a visible key give 0 and no gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which.
        BackendError: the backend asked for cannot serve the call.
    """
    if isinstance(query, torch.Tensor) and query.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is None and type(dropout_p) is float and dropout_p == 0.0 and not enable_gqa:
        out = ordinary_attention(query, key, value, is_causal, scale)
        if out is not None:
            return out
    if any_stands_in(query, key, value, attn_mask):
        return overridden(
            scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    return served(sdpa_request(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))


def served(request: AttentionRequest, first_row: torch.Tensor | None = None) -> torch.Tensor:
    """The output of :func:`scaled_dot_product_attention`.

    ``first_row``, one int64: how many sequences of a batch come before the call's, for the dropout mask. PyTorch's own
    operator draws another mask.
    """
    choice = pick(OP, request)
    form = form_of(request, choice)
    if form is None or form.name == CHUNKS:
        out, _ = apply_attention(_seeded(request.call, first_row), choice.backend)
    else:
        out = attention_by_form(request, form)
    if len(request.leading) == 2 or (form is not None and form.as_given):
        return out
    return out.reshape(*request.leading, *out.shape[-2:])


def _samples(device, dtype):
    def make(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    yield Sample("causal_wide", (make(2, 3, 17, 8), make(2, 3, 25, 8), make(2, 3, 25, 8)), dict(is_causal=True))
    yield Sample("causal_tall", (make(3, 21, 8), make(3, 9, 8), make(3, 9, 5)), dict(is_causal=True))
    yield Sample("two_dims", (make(13, 8), make(7, 8), make(7, 8)), dict(scale=0.3))
    yield Sample("five_dims", (make(2, 1, 2, 6, 8), make(1, 3, 2, 9, 8), make(2, 3, 1, 9, 4)), {})
    yield Sample("broadcast", (make(2, 6, 8), make(3, 2, 9, 8), make(3, 2, 9, 8)), dict(attn_mask=make(2, 1, 9)))
    yield Sample("grouped", (make(1, 6, 11, 8), make(1, 2, 11, 8), make(1, 2, 11, 8)), dict(enable_gqa=True))
    yield Sample("one_key", (make(1, 2, 5, 8), make(1, 2, 1, 8), make(1, 2, 1, 8)), {})
    rows = torch.rand(2, 1, 10, 12, device=device) < 0.4
    rows[:, :, 3] = False
    yield Sample("empty_row", (make(2, 2, 10, 8), make(2, 2, 12, 8), make(2, 2, 12, 8)), dict(attn_mask=rows))


def _examples(device):
    """The samples that ``fastllm info`` asks about."""
    for sample in attention_examples(device):
        options = dict(sample.kwargs)
        if "causal" in options:
            options["is_causal"] = options.pop("causal")
        if "bias" in options:
            options["attn_mask"] = options.pop("bias")
        if "window" not in options:
            yield Sample(sample.name, sample.args, options)


def _cost(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    call = sdpa_request(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).call
    q, k, v = call.q, call.k, call.v
    # A top-left diagonal leaves as many pairs as a band from the bottom right that starts Sk - Sq earlier.
    window = (None, q.shape[-2] - k.shape[-2]) if is_causal and q.shape[-2] >= k.shape[-2] else None
    if is_causal and window is None:
        k, v = k[:, :, : q.shape[-2]], v[:, :, : q.shape[-2]]
    return attention_cost(q, k, v, causal=is_causal and window is None, window=window, bias=call.bias)


register(
    Op(
        name=OP,
        summary="torch's scaled_dot_product_attention: masks, causal, grouped heads, dropout",
        function=scaled_dot_product_attention,
        reference=scaled_dot_product_attention_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager", "triton", "native", "hopper"),
        call=sdpa_request,
        refuses=_refuses,
        prefers_torch=_prefers_torch,
        form=form_of,
        examples=_examples,
    )
)
