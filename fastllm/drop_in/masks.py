"""Masks of attention in transformers' form: Boolean, where False hides, or numbers that are added to the scores."""

from __future__ import annotations

import torch


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
