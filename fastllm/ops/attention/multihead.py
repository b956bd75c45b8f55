"""torch.nn.MultiheadAttention on :func:`scaled_dot_product_attention` (Vaswani et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..linear import linear, pays
from ..shared.stand_ins import any_stands_in, as_leaf
from .sdpa import sdpa_request, served


def _check_mask(name: str, mask, shapes, query) -> None:
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = str(mask.dtype) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"MultiheadAttention: {name} must be a boolean or floating-point tensor, got {got}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"MultiheadAttention: {name} must have shape {' or '.join(str(s) for s in shapes)}, got {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise ValueError(f"MultiheadAttention: {name} is on {mask.device}, query on {query.device}")


class AttentionMasks(NamedTuple):
    """The masks of ``torch.nn.MultiheadAttention.forward``, by their names there."""

    key_padding_mask: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False


def multihead_attention(module, query, key, value, masks: AttentionMasks):
    """``(output, None)`` of a ``torch.nn.MultiheadAttention``, without the weights; arguments as its forward's."""
    key_padding_mask, attn_mask, is_causal = masks
    if is_causal and attn_mask is None:
        raise ValueError("MultiheadAttention: is_causal is a hint on attn_mask, which must be given with it")
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise ValueError(f"MultiheadAttention: expected 3 dimensions each, or 2 unbatched; got {shapes}")
    widths = (module.embed_dim, module.kdim, module.vdim)
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
        raise ValueError(f"MultiheadAttention: expected last dimensions {list(widths)}, got {shapes}")
    batched = query.dim() == 3
    q, k, v = _project(module, query, key, value)
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    elif not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    batch, length = q.shape[:2]
    if key.shape[:-1] != value.shape[:-1] or k.shape[0] != batch:
        raise ValueError(f"MultiheadAttention: batches and key lengths must agree, got {shapes}")
    size = k.shape[1]
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch, size)] if batched else [(size,)], query)
    if attn_mask is not None:
        _check_mask(
            "attn_mask", attn_mask, [(length, size), (batch * module.num_heads, length, size)], query
        )  # fmt: skip
    extra = int(module.bias_k is not None) + int(module.add_zero_attn)
    # The hint alone needs no mask. As in torch its edge is then the only one, also for keys that bias_k and
    # add_zero_attn add, which a mask would leave visible to all.
    causal = is_causal and key_padding_mask is None
    mask = None if causal else _merge(key_padding_mask, attn_mask, batch, q.dtype, extra)
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(batch, 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for x in (q, k, v))
    dropout_p = module.dropout if module.training else 0.0
    out = served(sdpa_request(q, k, v, mask, dropout_p, causal), getattr(module, "first_row", None))
    out = module.out_proj(out.transpose(1, 2).flatten(-2))
    if not batched:
        return out.squeeze(0), None
    return (out if module.batch_first else out.transpose(0, 1)), None


def _project(module, query, key, value):
    bias = module.in_proj_bias
    product = linear if pays(module.out_proj.weight) else F.linear
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif query is key and key is value:
        return product(query, module.in_proj_weight, bias).chunk(3, -1)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(product(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _merge(key_padding_mask, attn_mask, batch: int, dtype, extra: int):
    """One mask for scaled_dot_product_attention: True for what takes part, or added; None if there is none."""
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(batch, 1, 1, -1))
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (batch, -1)) if attn_mask.dim() == 3 else attn_mask[None, None])
    if not masks:
        return None
    masks = [F.pad(m, (0, extra)) for m in masks]
    if all(m.dtype == torch.bool for m in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
        for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, with the same arguments, outputs and state_dict keys.

    With ``need_weights=False`` the attention is :func:`fastllm.functional.scaled_dot_product_attention`, and the
    weights, (N, heads, L, S), never exist. With ``need_weights=True``, torch's default, the weights are needed, so the
    call is torch's own. Nested tensors also take torch's own call.

    ``first_row`` is set by :func:`fastllm.training.dropout.key_dropout`.
    """

    first_row: torch.Tensor | None = None

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ):  # fmt: skip
        """As torch's: (L, N, E) tensors, (N, L, E) if ``batch_first``, or (L, E) for one sequence.

        Args:
            query, key, value: of width embed_dim, kdim and vdim.
            key_padding_mask: (N, S): True for keys to leave out, or numbers to add, large and negative for keys to
                leave out.
            need_weights: whether the second output is the attention weights, which takes torch's own path.
            attn_mask: (L, S) or (N * heads, L, S), the same way round.
            average_attn_weights: average the weights over heads, if they are returned.
            is_causal: ``attn_mask`` is the causal mask. It must be given too, as torch demands.

        Returns:
            (output, weights or None).

        Raises:
            TypeError, ValueError: a mask or shape does not fit.
        """
        if any_stands_in(query, key, value):
            options = dict(
                key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
            node = as_leaf(self, query, key, value, **options)
            if node is not None:
                return node
        if need_weights or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return multihead_attention(self, query, key, value, AttentionMasks(key_padding_mask, attn_mask, is_causal))
