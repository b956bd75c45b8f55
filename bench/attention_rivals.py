"""Other attentions under the op's own signature; what one of them lacks, it refuses."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

FEATURES = ("window", "softcap", "alibi_slopes", "sinks", "bias", "dropout_p", "cu_seqlens_q", "cu_seqlens_k")


def _refuse(options: dict, *has: str) -> None:
    """Raises NotImplementedError for an option that is set and not in ``has``."""
    missing = [name for name in FEATURES if name not in has and (options.get(name) not in (None, 0.0))]
    if missing:
        raise NotImplementedError(f"does not take {', '.join(missing)}")


def _top_left(causal: bool, query, key) -> bool:
    """``causal``, which counts from the last row, for one who counts from the first."""
    if causal and query.shape[-2] not in (1, key.shape[-2]):
        raise NotImplementedError("does not take causal with queries fewer than keys")
    return causal and query.shape[-2] != 1


def _sdpa(name: str) -> Callable[[], Callable]:
    """torch's scaled_dot_product_attention, pinned to one of its backends."""

    def setup():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)

        def attention(query, key, value, *, causal=False, **options):
            _refuse(options, "bias", "dropout_p")
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, key, value, options.get("bias"), options.get("dropout_p", 0.0),
                    _top_left(causal, query, key), enable_gqa=query.shape[1] != key.shape[1],
                )  # fmt: skip

        return attention

    return setup


def _hopper():
    """Our own attention by the backend ``hopper``, which only serves those who ask for it."""
    from ..backends import BackendError, backend, why_not
    from ..ops.attention.attention import attention

    reason = why_not("hopper", "cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        raise NotImplementedError(reason)

    def call(*args, **kwargs):
        try:
            with backend("hopper"):
                return attention(*args, **kwargs)
        except BackendError as error:
            raise NotImplementedError(str(error)) from None

    return call


class _Longest:
    """The longest sequence of each ``cu_seqlens``, read back from the device once while that tensor lives."""

    def __init__(self):
        self._known = WeakTensorKeyDictionary()

    def of(self, starts: torch.Tensor) -> int:
        if starts not in self._known:
            self._known[starts] = int(starts.diff().max())
        return self._known[starts]


def _varlen():
    from torch.nn.attention.varlen import varlen_attn

    longest = _Longest()

    def attention(query, key, value, *, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, window=None, **options):
        _refuse(options)
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise NotImplementedError("takes packed sequences only")
        left, right = window or (-1, -1)
        return varlen_attn(
            query, key, value, cu_seqlens_q, cu_seqlens_k, longest.of(cu_seqlens_q), longest.of(cu_seqlens_k),
            window_size=(left, 0 if causal else right),
        )  # fmt: skip

    return attention


def _mask(rows, cols, causal, window, starts):
    """FlexAttention's mask function; None where every query sees every key. ``starts``: of packed sequences."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    if left < 0 and right < 0 and starts is None:
        return None
    offset, document = cols - rows, None
    if starts is not None:
        document = torch.bucketize(torch.arange(rows, device=starts.device), starts[1:-1], right=True)

    def mask(b, h, i, j):
        seen = i >= 0
        if right >= 0:
            seen = seen & (j <= i + offset + right)
        if left >= 0:
            seen = seen & (j >= i + offset - left)
        return seen if document is None else seen & (document[i] == document[j])

    return mask


def _score(offset, softcap, alibi_slopes, bias):
    """FlexAttention's score function; None where scores stay as they are. ``offset``: keys before the first query."""
    if softcap is None and alibi_slopes is None and bias is None:
        return None

    def score(s, b, h, i, j):
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            s = s - alibi_slopes[h] * (i + offset - j).abs()
        return s if bias is None else s + bias[0, h, i, j]

    return score


def _flex():
    """FlexAttention, compiled; its score and mask functions and the block mask are made at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    made: dict[tuple, tuple] = {}

    def attention(
        query, key, value, *, causal=False, window=None, softcap=None, alibi_slopes=None, bias=None, sinks=None,
        cu_seqlens_q=None, cu_seqlens_k=None, **options,
    ):  # fmt: skip
        _refuse(options)
        if cu_seqlens_q is not None:
            query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        tensors = (alibi_slopes, bias, cu_seqlens_q)  # what is made holds them, so an id stays one tensor's
        at = (tuple(query.shape), tuple(key.shape), causal, window, softcap, *map(id, tensors))
        if at not in made:
            rows, cols = query.shape[-2], key.shape[-2]
            mask = _mask(rows, cols, causal, window, cu_seqlens_q)
            if mask is not None:
                mask = create_block_mask(mask, None, None, rows, cols, device=query.device, _compile=True)
            made[at] = _score(cols - rows, softcap, alibi_slopes, bias), mask
        score, blocks = made[at]
        settings = dict(score_mod=score, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])
        if sinks is None:
            out = compiled(query, key, value, **settings)
        else:  # exp(sink) in the softmax's denominator
            out, lse = compiled(query, key, value, return_lse=True, **settings)
            out = out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)
        return out if cu_seqlens_q is None else out[0].transpose(0, 1)

    return attention


def _flash(package: str) -> Callable[[], Callable]:
    """FlashAttention 2 (``flash_attn``) or 3 (``flash_attn_interface``)."""

    def setup():
        module = __import__(package)
        has = ("window", "softcap", *(("alibi_slopes", "dropout_p") if package == "flash_attn" else ()))
        longest = _Longest()

        def attention(query, key, value, *, causal=False, window=None, cu_seqlens_q=None, cu_seqlens_k=None, **options):
            _refuse(options, *has)
            settings = dict(causal=causal, window_size=window or (-1, -1))
            settings |= {name: options[name] for name in has if options.get(name) is not None}
            if cu_seqlens_q is not None and cu_seqlens_k is not None:
                out = module.flash_attn_varlen_func(
                    query, key, value, cu_seqlens_q.int(), cu_seqlens_k.int(), longest.of(cu_seqlens_q),
                    longest.of(cu_seqlens_k), **settings,
                )  # fmt: skip
                return out[0] if isinstance(out, tuple) else out
            out = module.flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), **settings)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attention

    return setup


def _xformers():
    xformers = import_module("xformers.ops")

    def attention(query, key, value, *, causal=False, **options):
        _refuse(options, "dropout_p")
        if query.shape[1] != key.shape[1]:
            raise NotImplementedError("does not take grouped heads")
        mask = xformers.LowerTriangularMask() if _top_left(causal, query, key) else None
        layout = (t.transpose(1, 2) for t in (query, key, value))
        return xformers.memory_efficient_attention(*layout, mask, options.get("dropout_p", 0.0)).transpose(1, 2)

    return attention


rivals = {
    "fastllm hopper": _hopper,
    "SDPA flash": _sdpa("FLASH_ATTENTION"),
    "SDPA cuDNN": _sdpa("CUDNN_ATTENTION"),
    "SDPA efficient": _sdpa("EFFICIENT_ATTENTION"),
    "SDPA math": _sdpa("MATH"),
    "varlen_attn": _varlen,
    "FlexAttention": _flex,
    "flash-attn 2": _flash("flash_attn"),
    "flash-attn 3": _flash("flash_attn_interface"),
    "xformers": _xformers,
}
