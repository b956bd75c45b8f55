"""Attention: softmax(query key^T * scale + ...) value, with every feature in one call.

Normal form, which the operators and backends take: query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), or
packed (total, H, D) with both cu_seqlens; bias bool or floating of four dimensions, each full or 1; the window as
left and right distances from the diagonal, -1 where unbounded; ``bottom_right``: the diagonal ends in the last row and
column, otherwise it starts in the first.
"""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F

from ...backends import pick_by_tensors, plain_eager
from ...registry import Op, define, register
from ..shared.autograd import apply, autocasts, gradients
from .amx import amx_attention, amx_exception, amx_serves
from .call import Call, Forward, Upstream, Wanted, check_attention, check_dropout, check_scale, check_window
from .reference import draw_seed, reference
from .samples import attention_cost, attention_samples
from .torch_fused import faster_in_torch, torch_attention, torch_exception

MAX_HEAD_DIM = 256


def like_query(x, heads: int, length: int, dim: int, packed: bool):
    """Uninitialised (B, heads, length, dim), laid out (B, length, heads, dim); packed (length, heads, dim), zeros."""
    if packed:
        # Rows past the last sequence are written by nobody.
        return x.new_zeros(length, heads, dim)
    return x.new_empty(x.shape[0], length, heads, dim).transpose(1, 2)


def _sizes(q, k, packed):
    return (q.shape[1], k.shape[1], q.shape[0], k.shape[0]) if packed else (q.shape[1], k.shape[1], *_lengths(q, k))


def _lengths(q, k):
    return q.shape[2], k.shape[2]


_SPEC = "float scale, float softcap, int left, int right, bool bottom_right, float dropout_p, str backend"


def _fwd_fake(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, p, backend):
    heads, _, rows, _ = _sizes(q, k, cu_q is not None)
    shape = (heads, rows) if cu_q is not None else (q.shape[0], heads, rows)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = like_query(q, heads, rows, v.shape[-1], cu_q is not None)
    return out, q.new_empty(shape, dtype=wide), q.new_empty((2, *shape), dtype=wide)


@define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
    f"Tensor? cu_q, Tensor? cu_k, {_SPEC}) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _attention_fwd(q, k, v, *rest):
    *rest, backend = rest
    call = Call(q, k, v, *rest)
    packed = call.cu_q is not None
    heads, _, rows, _ = _sizes(q, k, packed)
    out = like_query(q, heads, rows, v.shape[-1], packed)
    if backend == "hopper":
        from ...kernels.attention.hopper import attention_hopper_fwd

        return out, *attention_hopper_fwd(call, out)
    if backend == "triton":
        from ...kernels.attention.forward import attention_fwd

        return out, *attention_fwd(call, out)
    from .eager import attention_fwd

    return out, *attention_fwd(*call, out)


def _gradient_buffers(q, k, v, bias, sinks, cu_q, needs):
    packed = cu_q is not None
    heads, heads_kv, rows, cols = _sizes(q, k, packed)
    return [
        like_query(x, h, s, x.shape[-1], packed) if need else None
        for x, h, s, need in zip((q, k, v), (heads, heads_kv, heads_kv), (rows, cols, cols), needs, strict=False)
    ]


def _bwd_fake(dout, dlse, out, stats, needs, q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec):
    grads = _gradient_buffers(q, k, v, bias, sinks, cu_q, needs)
    for x, need in ((bias, needs[3]), (sinks, needs[4])):
        grads.append(x.new_empty(x.shape) if need else None)
    return tuple(q.new_empty(0) if g is None else g for g in grads)


@define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor stats, bool[5] needs, Tensor q, Tensor k, Tensor v, "
    "Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, Tensor? cu_q, Tensor? cu_k, "
    f"{_SPEC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _attention_bwd(dout, dlse, out, stats, needs, q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec):
    *spec, backend = spec
    grads = _gradient_buffers(q, k, v, bias, sinks, cu_q, needs)
    wanted = Wanted(*grads, needs[3], needs[4])
    if backend != "eager":
        from ...kernels.attention.backward import attention_bwd

        call = Call(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec)
        dbias, dsinks = attention_bwd(call, Forward(out, stats), Upstream(dout, dlse), wanted)
    else:
        from .eager import attention_bwd

        dbias, dsinks = attention_bwd(
            dout, dlse, q, k, v, out, stats, bias, sinks, slopes, seed, cu_q, cu_k, *spec, tuple(wanted)
        )
    return tuple(q.new_empty(0) if g is None else g for g in (*grads, dbias, dsinks))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p, backend
    ):  # fmt: skip
        # Each by name: where nothing requires a gradient torch.compile would take the first of *args for a ctx.
        return _attention_fwd(
            q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p,
            backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec = inputs[9:]
        out, _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:9], out, stats)

    @staticmethod
    def backward(ctx, dout, dlse, _dstats):
        nothing = (None,) * (6 + len(ctx.spec))
        if dout is None and dlse is None:
            return *(None,) * 3, *nothing
        q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, out, stats = ctx.saved_tensors
        # A boolean mask has no derivative and must stay out of the differentiable inputs.
        mask = bias if bias is not None and bias.dtype == torch.bool else None
        spec = ctx.spec

        def launch(inputs, outputs_grad, extras, needs):
            q, k, v, bias, sinks = inputs
            mask, slopes, seed, cu_q, cu_k, out, stats = extras
            dout, dlse = outputs_grad
            dout = torch.zeros_like(out) if dout is None else dout
            bias = mask if bias is None else bias
            return _attention_bwd(
                dout, dlse, out, stats, needs, q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec
            )  # fmt: skip

        def formula(q, k, v, bias, sinks):
            return reference(q, k, v, mask if bias is None else bias, sinks, slopes, seed, cu_q, cu_k, *spec[:-1])

        inputs = (q, k, v, None if mask is not None else bias, sinks)
        extras = (mask, slopes, seed, cu_q, cu_k, out, stats)
        grads = gradients(launch, formula, inputs, ctx.needs_input_grad[:5], (dout, dlse), extras)
        return *grads, *nothing[2:]


def apply_attention(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec):
    """``(out, lse)`` of a call in normal form, differentiable; the last of ``spec`` is the backend."""
    if plain_eager(spec[-1]):
        return reference(q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec[:-1])
    out, lse, _ = apply(_Attention, q, k, v, bias, sinks, slopes, seed, cu_q, cu_k, *spec)
    return out, lse


def kernel_refuses(query, value) -> str | None:
    """Why the attention kernels cannot take these tensors, or None."""
    widest = max(query.shape[-1], value.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"the kernels take head dims up to {MAX_HEAD_DIM}, got {widest}"
    return None


def autocast(*tensors):
    """What torch's autocast does to the arguments of scaled_dot_product_attention."""
    device_type = tensors[0].device.type
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def _normal(
    op, query, key, value, causal, window, scale, softcap, alibi_slopes, sinks, bias, dropout_p,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
):  # fmt: skip
    """The arguments of :func:`apply_attention` but for the last, after all checks."""
    if all(isinstance(x, torch.Tensor) for x in (query, key, value)):
        query, key, value = autocast(query, key, value)
    sinks, alibi_slopes, bias, cu_q, cu_k = check_attention(
        op, query, key, value, sinks, alibi_slopes, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    dropout_p = check_dropout(op, dropout_p)
    left, right = check_window(op, window, causal)
    scale = check_scale(op, scale, query.shape[-1])
    if softcap is not None and (not isinstance(softcap, numbers.Real) or not softcap >= 0):
        raise ValueError(f"{op}: softcap must be a number >= 0 (None or 0: none), got {softcap!r}")
    seed = draw_seed(query.device) if dropout_p > 0 else None
    spec = (scale, float(softcap or 0.0), left, right, True, dropout_p)
    return query, key, value, bias, sinks, alibi_slopes, seed, cu_q, cu_k, *spec


def attention_reference(
    query, key, value, *, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, dropout_p=0.0, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    return_lse=False,
):  # fmt: skip
    """The definition: all scores at once, in at least fp32; the same dropout mask for the same generator state."""
    args = _normal(
        "attention", query, key, value, causal, window, scale, softcap, alibi_slopes, sinks, bias, dropout_p,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    out, lse = reference(*args)
    return (out, lse) if return_lse else out


def attention(
    query, key, value, *, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, dropout_p=0.0, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    return_lse=False,
):  # fmt: skip
    """Fused attention (Dao 2023, FlashAttention-2), all features in one call, forward and backward.

    With i and j counted within their sequences, and diagonal = Sk - Sq::

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
        bias: added to the logits, or boolean with True for what takes part; any shape that broadcasts to
            (B, H, Sq, Sk), for packed calls (sequences, H, max_seqlen_q, max_seqlen_k). Differentiable.
        dropout_p: probability of dropping a softmax weight; the rest are scaled by 1 / (1 - p). The mask is keyed by
            a seed from the device's generator and by (batch, head, row, column): the same on every backend.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, where each packed sequence starts; the last
            entry ends the last one. Rows past it give 0. On a GPU the values are not checked.
        max_seqlen_q, max_seqlen_k: needed only for a bias in a packed call.
        return_lse: also return log sum exp t, natural logarithm, fp32 (B, H, Sq) or (H, total_q), differentiable;
            it includes the sink.

    Returns:
        (B, H, Sq, Dv) or (total_q, H, Dv) in query's dtype; with ``return_lse`` the pair (out, lse). Rows that see
        nothing give 0, lse = -inf and no gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which.
        BackendError: the backend asked for cannot serve the call (head dims above 256 need ``eager``).
    """
    args = _normal(
        "attention", query, key, value, causal, window, scale, softcap, alibi_slopes, sinks, bias, dropout_p,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    q, k, v, mask = args[:4]
    backend = pick_by_tensors(
        "attention", q, k, v, sinks, refused=dict.fromkeys(("triton", "hopper"), kernel_refuses(q, v))
    )
    kernels = backend != "eager"
    left, right = args[-4:-2]
    plain = all(x is None for x in (*args[4:9], softcap or None)) and left < 0 and not return_lse
    square = q.shape[-2] == k.shape[-2]
    faster = faster_in_torch(q, k, v, right == 0) if kernels and plain and mask is None and right <= 0 else None
    if faster is not None:
        return torch_attention(faster, q, k, v, right == 0, args[9])
    if not kernels and plain and sdpa_serves(q, k, v, mask) and (right < 0 or (right == 0 and square and mask is None)):
        if amx_serves(q, k, v, mask, right == 0):
            return amx_attention(q, k, v, mask, args[9], right == 0)
        # A plain bool even where the shapes are symbolic.
        gqa = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=right == 0, scale=args[9], enable_gqa=gqa)
    out, lse = apply_attention(*args, backend)
    return (out, lse) if return_lse else out


def sdpa_serves(q, k, v, mask) -> bool:
    """Whether torch's fused attention serves such a call without the memory of all scores."""
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return False
    return q.shape[-1] == v.shape[-1] and q.numel() > 0 and k.numel() > 0


register(
    Op(
        name="attention",
        summary="softmax(query key^T) value with masks, windows, biases, sinks and dropout",
        function=attention,
        reference=attention_reference,
        samples=attention_samples,
        cost=attention_cost,
        backends=("eager", "triton", "hopper"),
        exception=lambda device_type: amx_exception(device_type) or torch_exception(device_type),
    )
)
