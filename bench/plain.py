"""The bundled Transformer written with torch.nn.functional alone: what its training step is measured beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..models import Transformer
from ..models.blocks import rotary_tables


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of ``x`` (..., T, D) by its position's angle; cos, sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainTransformer:
    """A copy of ``model``'s weights, and its loss without any of fastllm's ops.

    Takes every configuration that :class:`~fastllm.models.Transformer` takes, dropout included.
    """

    def __init__(self, model: Transformer):
        self.config = model.config
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        if self.config.positions == "rotary":
            device = model.token_embedding.weight.device
            self.rotary = rotary_tables(
                self.config.context_length, self.config.head_dim, self.config.rotary_base, device
            )

    def parameters(self) -> list[torch.Tensor]:
        return list(self.weights.values())

    def _linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x, name):
        weight, config = self.weights[f"{name}.weight"], self.config
        if config.norm == "rms":
            return F.rms_norm(x, weight.shape, weight, config.norm_eps)
        return F.layer_norm(x, weight.shape, weight, self.weights.get(f"{name}.bias"), config.norm_eps)

    def _attention(self, x, rotary, name):
        config, (batch, length, _) = self.config, x.shape
        heads = (config.num_heads, config.kv_heads, config.kv_heads)
        parts = self._linear(x, f"{name}.qkv").split([n * config.head_dim for n in heads], -1)
        query, key, value = (part.view(batch, length, -1, config.head_dim).transpose(1, 2) for part in parts)
        if config.qk_norm:
            query, key = (F.rms_norm(t, (config.head_dim,), eps=config.norm_eps) for t in (query, key))
        if rotary is not None:
            query, key = (rotate(t, *rotary) for t in (query, key))
        grouped = config.kv_heads != config.num_heads
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self._linear(out.transpose(1, 2).reshape(batch, length, -1), f"{name}.out")

    def _mlp(self, x, name):
        x = self._linear(x, f"{name}.up")
        if self.config.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.config.activation == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")
        return self._linear(x, f"{name}.down")

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, T) given ``tokens``; -100 is ignored."""
        config, weights, length = self.config, self.weights, tokens.shape[1]
        x = F.embedding(tokens, weights["token_embedding.weight"])
        rotary = None
        if config.positions == "learned":
            x = x + weights["position_embedding.weight"][:length]
        else:
            rotary = tuple(table[:length] for table in self.rotary)
        if config.embedding_norm:
            x = self._norm(x, "embedding_norm")
        x = F.dropout(x, config.dropout)
        for i in range(config.num_layers):
            name = f"blocks.{i}"
            x = x + F.dropout(
                self._attention(self._norm(x, f"{name}.attention_norm"), rotary, f"{name}.attention"), config.dropout
            )
            x = x + F.dropout(self._mlp(self._norm(x, f"{name}.mlp_norm"), f"{name}.mlp"), config.dropout)
        head = weights["token_embedding.weight" if config.tie_embeddings else "head.weight"]
        logits = F.linear(self._norm(x, "norm"), head)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).float()
