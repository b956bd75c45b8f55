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

import torch
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
    missing = _missing(config)
    if missing is not None:
        return Decision("attention", None, missing)
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
    query, key, value = (value_of(x) for x in (query, key, value))
    length, size = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and length > 1 and attention_mask is None
    if causal and size > length:
        # A cache with room ahead: without a mask the first query sees the first key.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if position_bias is not None:
        attention_mask, causal = _mask_with_bias(position_bias, attention_mask, causal, key), False
    if cache is not None or not plain(query, key, value, attention_mask, s_aux):
        if softcap is not None or s_aux is not None:
            raise NotImplementedError('attention "fastllm": no soft cap or sinks with a paged cache or such tensors')
        return _sdpa()(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, cache=cache,
            **kwargs,
        )  # fmt: skip
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


def _mask_with_bias(position_bias, attention_mask, causal: bool, key):
    """One additive mask of a bias and what hides keys: ``attention_mask`` (Boolean or additive), or ``causal``."""
    if attention_mask is None and causal:
        length, size = position_bias.shape[-2:]
        attention_mask = torch.ones(length, size, dtype=torch.bool, device=key.device).tril()
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype != torch.bool:
        return position_bias + attention_mask
    # The least finite number, as transformers has it: a row of which all is hidden is then uniform and not NaN.
    return torch.where(attention_mask, position_bias, torch.finfo(key.dtype).min)


def _sdpa():
    """What transformers calls for "sdpa"."""
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"]


def _missing(config) -> str | None:
    """Why the installed transformers cannot be asked for an attention of ours, or None.

    All that attention here needs of it: whatever is looked up later is looked up here, so that a version that lacks it
    is found before anything is changed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        return f"this transformers lacks a part of the attention interface: {error}"
    for interface in (AttentionInterface, AttentionMaskInterface):
        if not callable(getattr(interface, "register", None)):
            return f"this transformers has no {interface.__name__}.register"
        try:
            interface()["sdpa"]
        except (KeyError, TypeError) as error:
            return f'this transformers has no "sdpa" in {interface.__name__} ({type(error).__name__}: {error})'
    if "_attn_implementation_internal" not in vars(config):
        return "this transformers keeps the name of the attention in another place of the configuration"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


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
