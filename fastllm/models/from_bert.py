"""BERT's weights as transformers keeps them: the configuration's and the parameters' other names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import ModelConfig

# transformers' names of GELU -> ours.
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_ACTIVATIONS = {**GELUS, "relu": "relu"}
# Ours -> theirs, outside the layers and in layer i, for modules with weight and bias.
_OUTSIDE = {
    "encoder.embedding_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "masked.transform": "cls.predictions.transform.dense",
    "masked.norm": "cls.predictions.transform.LayerNorm",
    "next": "cls.seq_relationship",
    "classifier": "classifier",
    "span": "qa_outputs",
}
_LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TABLES = {
    "encoder.token_embedding.weight": "bert.embeddings.word_embeddings.weight",
    "encoder.position_embedding.weight": "bert.embeddings.position_embeddings.weight",
    "encoder.segment_embedding.weight": "bert.embeddings.token_type_embeddings.weight",
}


def _heads(names: set[str]) -> tuple[str, ...]:
    marks = {
        "mlm": "cls.predictions.bias", "nsp": "cls.seq_relationship.weight", "classify": "classifier.weight",
        "span": "qa_outputs.weight",
    }  # fmt: skip
    return tuple(head for head, mark in marks.items() if mark in names)


def _labels(values: Mapping, weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    names = values.get("id2label") or {}
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label: expected an object, got {names!r}")
    return tuple(str(names.get(i, names.get(str(i), f"LABEL_{i}"))) for i in range(len(weights["classifier.weight"])))


def _tied(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head for masked tokens has the token embedding's weight; files leave the copy out."""
    head = weights.get("cls.predictions.decoder.weight")
    return head is None or torch.equal(head, weights[_TABLES["encoder.token_embedding.weight"]])


def bert_config(values: Mapping, weights: Mapping[str, torch.Tensor]) -> ModelConfig:
    """The shape of a BERT, from its config.json; its heads from what weights there are.

    Raises:
        ValueError: a setting that this encoder cannot follow.
    """
    activation = values.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
    kind = values.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type: expected absolute, got {kind!r}")
    if values.get("is_decoder", False):
        raise ValueError("is_decoder: expected False; this encoder sees the tokens on both sides")
    heads = _heads(set(weights))
    if "mlm" in heads and activation != "gelu":
        raise ValueError(f"hidden_act: expected gelu with a head for masked tokens, got {activation!r}")
    return ModelConfig(
        encoder="transformer", decoder="none", heads=heads,
        labels=_labels(values, weights) if "classify" in heads else (),
        vocab_size=values["vocab_size"], context_length=values["max_position_embeddings"],
        num_layers=values["num_hidden_layers"], num_heads=values["num_attention_heads"],
        hidden_size=values["hidden_size"], intermediate_size=values["intermediate_size"], positions="learned",
        segments=values.get("type_vocab_size", 2), norm="layer", norm_position="post",
        norm_eps=values.get("layer_norm_eps", 1e-12), embedding_norm=True, activation=_ACTIVATIONS[activation],
        tie_embeddings=_tied(weights), dropout=values.get("hidden_dropout_prob", 0.1),
    )  # fmt: skip


def bert_weights(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters of :class:`fastllm.models.Encoder` from a BERT's, of whichever of transformers' classes.

    Raises:
        ValueError: a parameter is missing; names it.
    """
    if not any(name.startswith("bert.") for name in weights):
        weights = {f"bert.{name}": tensor for name, tensor in weights.items()}

    def take(name: str) -> torch.Tensor:
        if name not in weights:
            raise ValueError(f"these are not a BERT's weights: {name} is missing")
        return weights[name]

    result = {ours: take(theirs) for ours, theirs in _TABLES.items()}
    wanted = {"encoder.embedding_norm"}
    for head, modules in {
        "mlm": ("masked.transform", "masked.norm"), "nsp": ("pooler", "next"), "classify": ("pooler", "classifier"),
        "span": ("span",),
    }.items():  # fmt: skip
        wanted |= set(modules) if head in config.heads else set()
    for part in ("weight", "bias"):
        for ours in wanted:
            result[f"{ours}.{part}"] = take(f"{_OUTSIDE[ours]}.{part}")
        for i in range(config.encoder_layers):
            theirs, mine = f"bert.encoder.layer.{i}", f"encoder.blocks.{i}"
            result[f"{mine}.attention.qkv.{part}"] = torch.cat(
                [take(f"{theirs}.attention.self.{name}.{part}") for name in ("query", "key", "value")]
            )
            for ours, name in _LAYER.items():
                result[f"{mine}.{ours}.{part}"] = take(f"{theirs}.{name}.{part}")
    if "mlm" in config.heads:
        # Of two biases that differ, the head's own is the one that is added.
        own = weights.get("cls.predictions.decoder.bias")
        result["masked.head.bias"] = take("cls.predictions.bias") if own is None else own
        if not config.tie_embeddings:
            result["masked.head.weight"] = take("cls.predictions.decoder.weight")
    return result
