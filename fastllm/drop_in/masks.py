"""Masks of attention in transformers' form: Boolean, where False hides, or numbers that are added to the scores."""

from __future__ import annotations

import inspect
import re

import torch

from .configuration import switch_of

# A mask that is made from another, or a sum or product of one.
_REWRITTEN = re.compile(r"^\s*\w*mask [-+*]?= |[-+*] \w*mask\b|mask [-+*] ", re.MULTILINE)


def mask_with_bias(position_bias, attention_mask, causal: bool, key):
    """One additive mask of a bias and what hides keys: ``attention_mask`` (Boolean or additive), or ``causal``."""
    if attention_mask is None and causal:
        length, size = position_bias.shape[-2:]
        attention_mask = torch.ones(length, size, dtype=torch.bool, device=key.device).tril()
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype != torch.bool:
        return position_bias + attention_mask
    return torch.where(attention_mask, position_bias, additive(attention_mask, key.dtype))


def additive(mask, dtype: torch.dtype):
    """The mask of eager attention in transformers: the least finite number hides, so a row of it alone is uniform.

    Rows of left padding are such. Where False hides, they are 0, as with "sdpa".
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def rewrites_masks(cls: type) -> bool:
    """Whether the attention of class ``cls`` changes its mask before it calls its interface, as DeepSeek V4's does.

    True also where it only takes a part of one, and where the code cannot be read: no harm, but for the time.
    """
    try:
        return _REWRITTEN.search(inspect.getsource(cls)) is not None
    except (OSError, TypeError):
        return True


def make_mask(interface, *args, config=None, **kwargs):
    """What transformers calls for the masks of the attention named "fastllm": "sdpa"'s, which are Boolean or None.

    Code that was written for eager attention alone may change masks as numbers, and then gets eager's. ``interface`` is
    transformers' AttentionMaskInterface.
    """
    switch = switch_of(config)
    name = "eager" if switch is not None and switch.additive_masks else "sdpa"
    return interface[name](*args, config=config, **kwargs)
