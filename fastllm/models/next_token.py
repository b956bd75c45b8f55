"""One more token of each sequence through a decoder in float32 on a CPU: the blocks' arithmetic, and little else.

A step of a small model is bound by what surrounds its products: modules' calls, checks of arguments, the choice of
backends. :class:`NextToken` makes them once, when a cache is made, and calls the operators themselves. The numbers are
those of :mod:`.blocks`, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_modules

from .. import extension
from .. import nn as fast
from ..backends import chosen_backend, operators_alone
from ..ops.gated import GATE_ACTIVATIONS
from ..ops.linear_rows import MAX_ROWS, linear_rows
from ..ops.norm.native import undropped_norm
from ..ops.rotary_embedding import RotaryCall, rotary_rows
from .blocks import MLP, UNGATED, Attention, Block, Context, CrossAttention
from .embedding import Embedded
from .head import Head

# Modules whose arithmetic is known here. A subclass or a replacement may do something else.
KNOWN = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList,
    fast.Linear, fast.LayerNorm, fast.RMSNorm, fast.Embedding, Attention, CrossAttention, MLP, Block, Head,
)  # fmt: skip
# An MLP's activation with a gate -> that of its gate.
_OF_GATE = {
    "swiglu": GATE_ACTIVATIONS["silu"], "geglu": GATE_ACTIVATIONS["gelu"], "geglu_tanh": GATE_ACTIVATIONS["gelu_tanh"],
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ANY_MODULES_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def _plain(modules: Iterable[nn.Module]) -> bool:
    """Whether these are known modules with plain float32 weights on a CPU, without hooks."""
    for module in modules:
        if type(module) not in KNOWN or any(getattr(module, hooks) for hooks in _HOOKS):
            return False
        for p in module.parameters(recurse=False):
            if type(p.data) is not torch.Tensor or p.device.type != "cpu" or p.dtype != torch.float32:
                return False
    return extension.missing() is None and not any(getattr(torch_modules, name) for name in _ANY_MODULES_HOOKS)


def applies(decoder: Embedded) -> bool:
    """Whether :class:`NextToken` computes what ``decoder``'s blocks and last norm do."""
    return _plain([*decoder.blocks.modules(), decoder.norm])


def allowed(model: nn.Module) -> bool:
    """Whether nothing is at work that only the modules know of: gradients, dropout, autocast, a chosen backend, ..."""
    return not (
        torch.is_grad_enabled()
        or model.training
        or torch.is_autocast_enabled("cpu")
        or chosen_backend() != "auto"
        or torch.compiler.is_compiling()
        or operators_alone()
    )


def last_logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits (B, vocab_size) by ``model.head`` of ``states`` (B, hidden_size)."""
    head = model.head
    if len(states) <= MAX_ROWS and _plain([head]) and allowed(model):
        logits = linear_rows(states, head.weight, head.bias)
    else:
        logits = head(states)
    return logits if model.config.logit_scale == 1.0 else logits * model.config.logit_scale


class Now(NamedTuple):
    """What the blocks of one step share.

    ``new``, ``keys``, ``values``: by layer, where the token's key and value go, (2, B, kv_heads, head_dim), and all up
    to it, (B, kv_heads, length, head_dim). ``product``: what multiplies. ``rotary``: cos and sin, (1, head_dim / 2).
    """

    new: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    product: Callable
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    bias: torch.Tensor | None
    memory: dict[int, tuple[torch.Tensor, ...]]
    memory_mask: torch.Tensor | None


def _norm(norm: Any) -> Callable:
    """(branch, residual or None) -> (the norm of their sum, the sum, which is empty without a residual)."""
    center = isinstance(norm, nn.LayerNorm)

    def run(branch, residual):
        bias = norm.bias if center else None
        return undropped_norm(branch, residual, norm.weight, bias, eps=norm.eps, center=center)[:2]

    return run


def _attention(module: Attention, layer: int) -> Callable:
    config = module.config
    heads, kv_heads, size = config.num_heads, config.kv_heads, config.head_dim
    groups, scale = heads // kv_heads, None if config.scale_attention else 1.0
    turned = config.positions == "rotary"

    def branch(x, now):
        rows = len(x)
        together = now.product(x, module.qkv.weight, module.qkv.bias).view(rows, heads + 2 * kv_heads, size)
        if turned or config.qk_norm:
            both = together[:, : heads + kv_heads]
            if config.qk_norm:
                both = undropped_norm(both, None, None, None, eps=config.norm_eps, center=False)[0]
            if turned:
                cos, sin = now.rotary
                call = RotaryCall(both[:, :, None], None, cos, sin, None, offset=0, interleaved=False)
                both = rotary_rows(*call)[0][:, :, 0]
            query, key = both.split((heads, kv_heads), 1)
            now.new[layer][0].copy_(key)
            now.new[layer][1].copy_(together[:, heads + kv_heads :])
        else:
            query = together[:, :heads]
            now.new[layer].copy_(together[:, heads:].view(rows, 2, kv_heads, size).transpose(0, 1))
        # The query heads of one key head are rows of its attention: each sees all keys.
        query = query.view(rows, kv_heads, groups, size)
        bias = now.bias if now.bias is None else now.bias.view(1, kv_heads, groups, -1)
        out = F.scaled_dot_product_attention(query, now.keys[layer], now.values[layer], bias, scale=scale)
        return now.product(out.reshape(rows, -1), module.out.weight, module.out.bias)

    return branch


def _cross_attention(module: CrossAttention, layer: int) -> Callable:
    config = module.config
    scale = None if config.scale_attention else 1.0

    def branch(x, now):
        query = now.product(x, module.query.weight, module.query.bias)
        query = query.view(len(x), config.kv_heads, -1, config.head_dim)
        key, value = now.memory[layer]
        out = F.scaled_dot_product_attention(query, key, value, now.memory_mask, scale=scale)
        return now.product(out.reshape(len(x), -1), module.out.weight, module.out.bias)

    return branch


def _mlp(module: MLP) -> Callable:
    gated = module.activation in _OF_GATE
    activation = _OF_GATE[module.activation] if gated else UNGATED[module.activation]

    def branch(x, now):
        x = now.product(x, module.up.weight, module.up.bias)
        if gated:
            gate, up = x.chunk(2, -1)
            x = activation(gate).mul_(up)
        else:
            x = activation(x)
        return now.product(x, module.down.weight, module.down.bias)

    return branch


def _branches(block: Block, layer: int) -> list[tuple[Callable, Callable]]:
    found = [(_norm(block.attention_norm), _attention(block.attention, layer))]
    if block.cross:
        found.append((_norm(block.cross_norm), _cross_attention(block.cross_attention, layer)))
    return [*found, (_norm(block.mlp_norm), _mlp(block.mlp))]


class NextToken:
    """The blocks and the last norm of ``decoder`` for one more token of each sequence; see :func:`applies`."""

    def __init__(self, decoder: Embedded):
        self.post = decoder.config.norm_position == "post"
        blocks: list[Any] = list(decoder.blocks)
        self.branches = [both for layer, block in enumerate(blocks) for both in _branches(block, layer)]
        self.norm = None if self.post else _norm(decoder.norm)

    def __call__(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The normed last states (B, 1, hidden_size) for embeddings ``x`` of that shape; the cache gets the token.

        Raises:
            ValueError: the cache was made for another number of sequences.
        """
        rows, cache = len(x), context.cache
        mask = None if context.memory_mask is None else context.memory_mask[:, None, None, :]
        product = linear_rows if rows <= MAX_ROWS else F.linear
        news, keys, values = cache.room(rows)
        now = Now(news, keys, values, product, context.rotary, context.bias, cache.memory, mask)
        x, branch = x[:, 0], None
        for norm, branch_of in self.branches:
            if self.post:
                x = norm(branch_of(x, now), x)[0]
                continue
            y, x = (norm(x, None)[0], x) if branch is None else norm(branch, x)
            branch = branch_of(y, now)
        return (x if self.norm is None else self.norm(branch, x)[0])[:, None]
