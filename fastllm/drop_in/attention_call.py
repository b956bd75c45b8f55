"""One call of attention in transformers' form: ours where it fits, else the attention that was there before."""

from __future__ import annotations

import functools
import math
import sys

import torch

from ..backends import chosen_backend
from ..functional import attention, scaled_dot_product_attention
from ..ops.attention.step import attention_step, takes_step
from .calls import own, serve, watched
from .configuration import switch_of
from .deferred import value_of
from .masks import additive, mask_with_bias
from .plain import plain


def attention_forward(module, *args, **kwargs):
    """What transformers calls for the attention named "fastllm"; see :func:`_attention_forward`."""
    return serve(module, _attention_forward, module, *args, **kwargs)


def _attention_forward(
    module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, is_causal=None, position_bias=None,
    cache=None, softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """Attention in transformers' form; (B, H, S, D) in, (B, S, H, D) out, no weights.

    The conventions are those of its own "sdpa": a mask hides what is causal as well; without one ``is_causal``, or the
    module's attribute, decides, and one query never is.
    """
    query, key, value = (value_of(x) for x in (query, key, value))
    switch = switch_of(vars(module).get("config"))
    if switch is not None:
        softcap = None if "softcap" in switch.passed_over else softcap
        s_aux = None if "s_aux" in switch.passed_over else s_aux
    length, size = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and length > 1 and attention_mask is None
    if causal and size > length:
        # A cache with room ahead: without a mask the first query sees the first key.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if position_bias is not None:
        attention_mask, causal = mask_with_bias(position_bias, attention_mask, causal, key), False
    stands_for_eager = switch is not None and switch.before == "eager"
    before = functools.partial(_eager if stands_for_eager else _sdpa_alone, module, query, key, value)
    rest = dict(dropout=dropout, scaling=scaling, is_causal=causal, softcap=softcap, s_aux=s_aux)
    why = _unfit(module, query, key, value, (attention_mask, s_aux), cache)
    if why is not None:
        own("attention", why)
        return before(attention_mask, **rest, cache=cache, **kwargs)
    bias = attention_mask
    if stands_for_eager and s_aux is None and bias is not None and bias.dtype == torch.bool:
        bias = additive(bias, query.dtype)
    if length == 1 and not causal and bias is None and softcap is s_aux is None and dropout == 0.0:
        out = _one_query(query, key, value, scaling)
        if out is not None:
            return out, None
    try:
        if softcap is None and s_aux is None:
            out = scaled_dot_product_attention(
                query, key, value, bias, dropout, causal, scaling, enable_gqa=key.shape[1] != query.shape[1]
            )
        else:
            out = attention(
                query, key, value, causal=causal, scale=scaling, softcap=softcap, sinks=s_aux, bias=bias,
                dropout_p=dropout,
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        own("attention", str(error))
        return before(attention_mask, **rest, **kwargs)  # which says so in its own words
    return out.transpose(1, 2).contiguous(), None


def _unfit(module, query, key, value, others, cache) -> str | None:
    """Why the attention that was there before takes a call, or None. ``others``: mask and sinks."""
    groups = vars(module).get("num_key_value_groups")
    if groups is not None and groups * key.shape[1] != query.shape[1]:
        # transformers repeats keys as often as the module says, and raises where that is not what queries need.
        return f"{key.shape[1]} heads of keys in {groups} groups for {query.shape[1]} of queries"
    if cache is not None or not plain(query, key, value, *others):
        return "a paged cache, or tensors that are not plain dense ones on a CPU or GPU"
    return None


def _one_query(query, key, value, scaling):
    """What scaled_dot_product_attention() comes to for a decoder's step on a CPU, (B, 1, H, D); None where it may not.

    Without its choices, which take 15 us.
    """
    if watched() or chosen_backend() != "auto" or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return None
    (batch, heads, _, dim), dtype = query.shape, query.dtype
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != dim or 0 in key.shape or query.dim() != 4:
        return None
    if heads % key.shape[1] or not dtype == key.dtype == value.dtype or not takes_step(query, key, value, None):
        return None
    scale = 1.0 / math.sqrt(dim) if scaling is None else scaling
    return attention_step(query, key, value, None, scale).view(batch, 1, heads, dim)


def _sdpa_alone(module, query, key, value, attention_mask, *, softcap, s_aux, **kwargs):
    """What transformers calls for "sdpa", which has no soft cap and no sinks."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(
            'attention "fastllm": softcap and s_aux (sinks) need dense tensors, no paged cache and a mask that fits; '
            'set_attn_implementation("eager") takes the others'
        )
    return transformers_sdpa()(module, query, key, value, attention_mask, **kwargs)


def _eager(module, query, key, value, attention_mask, *, is_causal, softcap, s_aux, cache=None, **kwargs):
    """The attention of ``module``'s own code, which takes additive masks and knows nothing of ``is_causal``."""
    if is_causal and attention_mask is None:
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = additive(attention_mask, query.dtype)
    given = dict(cache=cache, softcap=softcap, s_aux=s_aux)
    kwargs |= {name: value for name, value in given.items() if value is not None}
    out, _ = sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return out, None


def transformers_sdpa():
    """What transformers calls for "sdpa"."""
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"]
