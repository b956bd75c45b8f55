"""Attention: softmax(query key^T * scale + ...) value, with every feature in one call."""

from __future__ import annotations

from typing import Any

from ...backends import pick, product_obstacle
from ...registry import Op, register
from ..shared.check import beyond_float32
from ..shared.philox import draw_seed
from ..shared.stand_ins import any_stands_in, overridden
from .call import (
    AttentionCall,
    AttentionRequest,
    cast_qkv,
    check_attention,
    check_dropout,
    check_scale,
    check_softcap,
    check_window,
)
from .forms import CHUNKS, attention_by_form, form_of, formed
from .native import native_loses
from .operator import apply_attention
from .ordinary import ordinary_attention
from .reference import reference
from .samples import attention_cost, attention_examples, attention_samples

MAX_HEAD_DIM = 256


def kernels_refuse(backend: str, request: AttentionRequest) -> str | None:
    """Why the attention kernels cannot take a call, or None."""
    call = request.call
    widest = max(call.q.shape[-1], call.v.shape[-1])
    if backend == "native" and (reason := beyond_float32((call.q,))) is not None:
        return reason
    if backend != "eager" and widest > MAX_HEAD_DIM:
        return f"the kernels take head dims up to {MAX_HEAD_DIM}, got {widest}"
    if backend in ("triton", "hopper"):
        from ...kernels.sizes import ATTENTION_ROWS

        _, _, rows, columns = call.sizes()
        if max(rows, columns) > ATTENTION_ROWS:
            return f"the kernels take up to {ATTENTION_ROWS:,} rows of query and of key, got {rows:,} and {columns:,}"
    return None


def attention_prefers_torch(request: AttentionRequest) -> str | None:
    """Why PyTorch's own operators serve a call without being asked for, or None."""
    q = request.call.q
    if not q.is_cpu:
        return product_obstacle(q.device.type, q.device.index)
    # Asked here too: what the extension refuses is PyTorch's without a warning.
    return native_loses(request) or kernels_refuse("native", request)


def _request(
    query, key, value, *, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, dropout_p=0.0, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    return_lse=False,
):  # fmt: skip
    """The arguments of :func:`attention` as one value, after all checks."""
    query, key, value = cast_qkv(query, key, value)
    call = AttentionCall(
        query, key, value, bias=bias, sinks=sinks, slopes=alibi_slopes, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k
    )
    bias, sinks, slopes, cu_q, cu_k = check_attention("attention", call, (max_seqlen_q, max_seqlen_k))
    dropout_p = check_dropout("attention", dropout_p)
    left, right = check_window("attention", window, causal)
    if right == 0 and cu_q is None and query.shape[2] == 1:
        right = -1  # The last row sees every column: a causal edge hides nothing from it.
    scale = check_scale("attention", scale, query.shape[-1])
    softcap = check_softcap("attention", softcap)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    call = AttentionCall(
        query, key, value, bias=bias, sinks=sinks, slopes=slopes, seed=seed, cu_q=cu_q, cu_k=cu_k, scale=scale,
        softcap=softcap, left=left, right=right, dropout_p=dropout_p,
    )  # fmt: skip
    return formed(AttentionRequest(call, bool(return_lse)))


def attention_reference(query, key, value, **options):
    """The definition: all scores at once, in at least fp32; the same dropout mask for the same generator state."""
    request = _request(query, key, value, **options)
    out, lse = reference(request.call)
    return (out, lse) if request.return_lse else out


def attention(
    query, key, value, *, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, dropout_p=0.0, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    return_lse=False,
):  # fmt: skip
    """Fused attention (Dao 2023, FlashAttention-2), all features in one call, forward and backward.

    With i and j as positions within their sequences, and diagonal = Sk - Sq::

        t = query key^T * scale
        t = softcap * tanh(t / softcap)                     if softcap
        t = t - slope * |i + diagonal - j| + bias           -inf where a mask or window hides j from i
        out = dropout(softmax(t)) value                     exp(sink) added to the softmax's denominator if sinks

    Args:
        query: (B, H, Sq, D), or packed (total_q, H, D) with ``cu_seqlens``. Any strides.
        key, value: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), or packed. H must be a multiple of Hkv: query head h reads
            key head h // (H / Hkv). Dv may differ from D.
        causal: hide j > i + diagonal (bottom-right, as FlashAttention; Sq > Sk leaves leading rows empty).
        window: (left, right): hide j < i + diagonal - left and j > i + diagonal + right. None or -1: unbounded.
        scale: by default 1 / sqrt(D).
        softcap: bound of the logits (Gemma 2); None or 0 for none.
        alibi_slopes: fp32 (H,) or (B, H), constants (Press et al. 2022).
        sinks: (H,) logits of a column without a value (gpt-oss); differentiable.
        bias: added to the logits, or boolean with True for keys that take part; any shape that broadcasts to (B, H, Sq,
            Sk), for packed calls (sequences, H, max_seqlen_q, max_seqlen_k). Differentiable.
        dropout_p: probability of dropping a softmax weight; the rest are scaled by 1 / (1 - p). The mask is keyed by a
            seed from the device's generator and by (batch, head, row, column): it is the same on every backend.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, where each packed sequence starts; the last
            entry ends the last one. Rows past it give 0. On a GPU the values are not checked.
        max_seqlen_q, max_seqlen_k: needed only for a bias in a packed call. No sequence may be longer: on a GPU a
            sequence that the bias has no room for fails a device-side assert.
        return_lse: also return log sum exp t, natural logarithm, fp32 (B, H, Sq) or (H, total_q), differentiable;
            it includes the sink.

    Returns:
        (B, H, Sq, Dv) or (total_q, H, Dv) in query's dtype; with ``return_lse`` the pair (out, lse). Rows without a
        visible key give 0, lse = -inf and no gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which.
        BackendError: the backend asked for cannot serve the call (head dims above 256 need ``eager``).
    """
    if (
        window is None and softcap is None and alibi_slopes is None and sinks is None and bias is None
        and type(dropout_p) is float and dropout_p == 0.0 and cu_seqlens_q is None and cu_seqlens_k is None
        and max_seqlen_q is None and max_seqlen_k is None and not return_lse
    ):  # fmt: skip
        out = ordinary_attention(query, key, value, causal, scale)
        if out is not None:
            return out
    options: dict[str, Any] = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, bias=bias,
        dropout_p=dropout_p, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, return_lse=return_lse,
    )  # fmt: skip
    if any_stands_in(query, key, value, *options.values()):
        return overridden(attention, query, key, value, **options)
    request = _request(query, key, value, **options)
    choice = pick("attention", request)
    form = form_of(request, choice)
    if form is not None and form.name != CHUNKS:
        return attention_by_form(request, form)
    out, lse = apply_attention(request.call, choice.backend)
    return (out, lse) if return_lse else out


register(
    Op(
        name="attention",
        summary="softmax(query key^T) value with masks, windows, biases, sinks and dropout",
        function=attention,
        reference=attention_reference,
        samples=attention_samples,
        cost=attention_cost,
        backends=("eager", "triton", "native", "hopper"),
        call=_request,
        refuses=kernels_refuse,
        prefers_torch=attention_prefers_torch,
        form=form_of,
        examples=attention_examples,
    )
)
