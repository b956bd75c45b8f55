"""Attention of Hugging Face models, through transformers' AttentionInterface, for one instance at a time.

A model asks its configuration which attention it is to call. Configurations are shared, between instances as well, so
the model gets copies of its own, in which the answer is "fastllm".
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator

from torch import nn

from ..functional import attention, scaled_dot_product_attention
from .deferred import value_of
from .plain import plain
from .rules import Decision
from .swap import Kind

NAME = "fastllm"
INTERFACE = Kind("attention_interface")
# Where a module keeps the configuration that it had before.
BEFORE = "_fastllm_config_before"
# Modelling code that asks for "sdpa" by name does something else for every other answer.
_NAMES_SDPA = re.compile(r"_attn_implementation[^\n]*sdpa|sdpa[^\n]*_attn_implementation")


def attention_decisions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Decision]]:
    """For each transformers model within ``model`` (itself or an encoder, a decoder, a tower): swap it or why not."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then no module is an instance of its classes
        return
    for path, module in model.named_modules():
        if isinstance(module, modeling.PreTrainedModel) and getattr(module, "config", None) is not None:
            decision = _decide(module)
            if decision is not None:
                yield path, module, decision


def _decide(module) -> Decision | None:
    config = module.config
    now = getattr(config, "_attn_implementation", None)
    source = _source(type(module))
    if "ALL_ATTENTION_FUNCTIONS" not in source and "get_interface" not in source:
        if re.search(r"class \w*Attention", source):
            return Decision("attention", None, "its code does not call attention through AttentionInterface")
        return None
    if now == NAME:
        return Decision("attention", None, "it is accelerated already")
    if _NAMES_SDPA.search(source):
        return Decision("attention", None, 'its code treats the attention called "sdpa" apart')
    if getattr(config, "output_attentions", False):
        return Decision("attention", None, "its configuration asks for attention weights, which are never computed")
    supported = getattr(module, "_supports_sdpa", False)
    if now == "sdpa" or (now == "eager" and not supported and getattr(module, "_supports_attention_backend", False)):
        return Decision("attention", INTERFACE, f'AttentionInterface, "{now}" before')
    if now == "eager":
        return Decision("attention", None, '"eager" attention was asked for, which gives its weights')
    return Decision("attention", None, f'its attention is "{now}"')


def _source(cls: type) -> str:
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        return ""


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None,
    cache=None, softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """What transformers calls for the attention named "fastllm"; (B, H, S, D) in, (B, S, H, D) out, no weights.

    The conventions are those of its own "sdpa": a mask hides what is causal as well; without one ``is_causal``, or the
    module's attribute, decides, and one query never is.
    """
    from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward

    query, key, value = (value_of(x) for x in (query, key, value))
    if cache is not None or not plain(query, key, value, attention_mask, position_bias, s_aux):
        if softcap is not None or s_aux is not None:
            raise NotImplementedError('attention "fastllm": no soft cap or sinks with a paged cache or such tensors')
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, cache=cache, **kwargs,
        )  # fmt: skip
    length, size = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and length > 1 and attention_mask is None
    if causal and size > length:
        # A cache with room ahead: without a mask the first query sees the first key.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
        causal = False
    if softcap is None and s_aux is None:
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    else:
        out = attention(
            query, key, value, causal=causal, scale=scaling, softcap=softcap, sinks=s_aux, bias=attention_mask,
            dropout_p=dropout,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def take_over(model: nn.Module, module: nn.Module) -> None:
    """Give every module of ``model`` a configuration of its own and ``module`` one that says "fastllm"."""
    _register()
    config_class = type(module.config)
    base = next(c for c in config_class.__mro__ if c.__name__ in ("PreTrainedConfig", "PretrainedConfig"))
    memo: dict = {}
    for part in model.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, base) and (BEFORE not in vars(part) or name not in vars(part)[BEFORE]):
                vars(part).setdefault(BEFORE, {})[name] = value
                vars(part)[name] = copy.deepcopy(value, memo)
    module.config._attn_implementation_internal = NAME


def give_back(model: nn.Module) -> int:
    """Undo :func:`take_over` in all of ``model``; returns how many models within it had been given the attention.

    A configuration that has been changed since is kept, with the attention that it named before.
    """
    changed = 0
    for part in model.modules():
        before = vars(part).pop(BEFORE, None)
        if before is None:
            continue
        for name, config in before.items():
            now = vars(part).get(name)
            if getattr(now, "_attn_implementation", None) == NAME:
                changed += name == "config" and hasattr(part, "get_input_embeddings")
            if now is not None and now.to_dict() == config.to_dict():
                vars(part)[name] = config
            elif getattr(now, "_attn_implementation", None) == NAME:
                now._attn_implementation_internal = config._attn_implementation
    return changed
