"""T5's weights as transformers keeps them: the configuration's and the parameters' other names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import ModelConfig

_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}
# T5 has no maximum length; a cache needs one. It was trained on sequences of 512 tokens.
CONTEXT = 512


def t5_config(values: Mapping, weights: Mapping[str, torch.Tensor]) -> ModelConfig:
    """The shape of a T5 (Raffel et al. 2020) or T5 1.1, from its config.json.

    Raises:
        ValueError: a setting that this model cannot follow.
    """
    activation = values.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"feed_forward_proj: expected one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
    width = values["d_model"]
    if not isinstance(width, int) or width < 1:  # whose root the logits' scale is
        raise ValueError(f"d_model: expected a whole number of at least 1, got {width!r}")
    if "shared.weight" not in weights:
        raise ValueError("these are not a T5's weights: shared.weight is missing")
    head = weights.get("lm_head.weight")
    tied = head is None or torch.equal(head, weights["shared.weight"])
    return ModelConfig(
        encoder="transformer", decoder="transformer", vocab_size=len(weights["shared.weight"]),
        context_length=values.get("n_positions", CONTEXT), num_encoder_layers=values["num_layers"],
        num_layers=values.get("num_decoder_layers") or values["num_layers"], num_heads=values["num_heads"],
        hidden_size=width, head_size=values["d_kv"], intermediate_size=values["d_ff"],
        positions="relative", relative_buckets=values.get("relative_attention_num_buckets", 32),
        relative_distance=values.get("relative_attention_max_distance", 128), norm="rms",
        norm_eps=values.get("layer_norm_epsilon", 1e-6), activation=_ACTIVATIONS[activation], bias=False,
        scale_attention=False, tie_embeddings=tied, dropout=values.get("dropout_rate", 0.1),
        # 1.1 does not scale. Newer files say so in a key of its own, older ones by not tying the head.
        logit_scale=width**-0.5
        if values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
        else 1.0,
    )  # fmt: skip


def t5_weights(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters of :class:`fastllm.models.EncoderDecoder` from a T5's.

    Raises:
        ValueError: a parameter is missing; names it.
    """

    def take(name: str) -> torch.Tensor:
        if f"{name}.weight" not in weights:
            raise ValueError(f"these are not a T5's weights: {name}.weight is missing")
        return weights[f"{name}.weight"]

    result = {"encoder.token_embedding.weight": take("shared")}
    if not config.tie_embeddings:
        result["head.weight"] = take("lm_head")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.num_layers)):
        result[f"{side}.norm.weight"] = take(f"{side}.final_layer_norm")
        result[f"{side}.relative_bias.weight"] = take(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias")
        for i in range(layers):
            ours, theirs = f"{side}.blocks.{i}", f"{side}.block.{i}.layer"
            attention = f"{theirs}.0.SelfAttention"
            result[f"{ours}.attention_norm.weight"] = take(f"{theirs}.0.layer_norm")
            result[f"{ours}.attention.qkv.weight"] = torch.cat([take(f"{attention}.{name}") for name in "qkv"])
            result[f"{ours}.attention.out.weight"] = take(f"{attention}.o")
            last = 1
            if side == "decoder":
                cross, last = f"{theirs}.1.EncDecAttention", 2
                result[f"{ours}.cross_norm.weight"] = take(f"{theirs}.1.layer_norm")
                result[f"{ours}.cross_attention.query.weight"] = take(f"{cross}.q")
                result[f"{ours}.cross_attention.key_value.weight"] = torch.cat([take(f"{cross}.{n}") for n in "kv"])
                result[f"{ours}.cross_attention.out.weight"] = take(f"{cross}.o")
            mlp = f"{theirs}.{last}.DenseReluDense"
            names = ("wi",) if config.activation == "relu" else ("wi_0", "wi_1")
            result[f"{ours}.mlp_norm.weight"] = take(f"{theirs}.{last}.layer_norm")
            result[f"{ours}.mlp.up.weight"] = torch.cat([take(f"{mlp}.{name}") for name in names])
            result[f"{ours}.mlp.down.weight"] = take(f"{mlp}.wo")
    return result
