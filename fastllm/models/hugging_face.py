"""Models as transformers keeps them: GPT-2's and Llama's config.json and parameter names both ways, others to read.

One :class:`Layout` for each decoder's ``model_type``; transformers itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file

from .config import ModelConfig
from .from_bert import GELUS, bert_config, bert_weights
from .from_t5 import t5_config, t5_weights

Weights = Mapping[str, torch.Tensor]
# Of the first number in a parameter's name.
_LAYER = re.compile(r"\b(?:h|layers?|block)\.([0-9]+)\.")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """One architecture's names.

    ``from_config``: the fields of our configuration from theirs. ``to_config``: theirs from ours, or a ValueError that
    says what this architecture cannot be. ``outside`` and ``block``: our parameter -> theirs, or the several that ours
    holds one after the other; in ``block`` relative to block and layer. ``transposed``: theirs that are (in, out).
    ``prefix``: in front of theirs, left out by some files.
    """

    from_config: Callable[[Mapping], dict]
    to_config: Callable[[ModelConfig], dict]
    outside: Mapping[str, str]
    layer: str
    block: Mapping[str, str | tuple[str, ...]]
    prefix: str
    transposed: tuple[str, ...] = ()
    split: Callable[[ModelConfig, str], list[int]] | None = None

    def ours_and_theirs(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """For each of our parameters the ones of theirs that it is made of."""
        found: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.outside.items()}
        for i in range(num_layers):
            for ours, theirs in self.block.items():
                several = theirs if isinstance(theirs, tuple) else (theirs,)
                found[f"blocks.{i}.{ours}"] = tuple(f"{self.layer.format(i)}.{name}" for name in several)
        return found


def _require(values: Mapping, name: str, *allowed, default=None) -> None:
    got = values.get(name, default)
    if got not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(repr(a) for a in allowed)}, got {got!r}")


def _from_gpt2(values: Mapping) -> dict:
    _require(values, "activation_function", *GELUS, default="gelu_new")
    _require(values, "scale_attn_weights", True, default=True)
    _require(values, "scale_attn_by_inverse_layer_idx", False, default=False)
    _require(values, "add_cross_attention", False, default=False)
    return dict(
        vocab_size=values["vocab_size"], context_length=values["n_positions"], num_layers=values["n_layer"],
        num_heads=values["n_head"], hidden_size=values["n_embd"], intermediate_size=values.get("n_inner"),
        positions="learned", norm="layer", norm_eps=values.get("layer_norm_epsilon", 1e-5), bias=True,
        activation=GELUS[values.get("activation_function", "gelu_new")],
        tie_embeddings=values.get("tie_word_embeddings", True), dropout=values.get("resid_pdrop", 0.1),
    )  # fmt: skip


# Neither architecture has what these settings of ours turn on, so their configurations leave them at these values.
_NEITHER = dict(
    encoder="none", decoder="transformer", embedding_norm=False, qk_norm=False, norm_position="pre", segments=0,
    scale_embeddings=False, scale_attention=True, logit_scale=1.0,
)  # fmt: skip


def _expect(config: ModelConfig, architecture: str, **fields) -> None:
    """Raises a ValueError that names every setting in which ``config`` differs from ``architecture``."""
    differences = []
    for name, expected in {**fields, **_NEITHER}.items():
        got = getattr(config, name)
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if got not in allowed:
            differences.append(f"{name} {' or '.join(repr(a) for a in allowed)} (here {got!r})")
    if differences:
        raise ValueError(f"transformers has no class for this model: {architecture} needs {', '.join(differences)}")


def _to_gpt2(config: ModelConfig) -> dict:
    _expect(
        config, "GPT-2", positions="learned", norm="layer", bias=True, activation=("gelu", "gelu_tanh"),
        num_kv_heads=(None, config.num_heads), head_size=(None, config.hidden_size // config.num_heads),
    )  # fmt: skip
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=config.vocab_size,
        n_positions=config.context_length, n_layer=config.num_layers, n_head=config.num_heads,
        n_embd=config.hidden_size, n_inner=config.intermediate_size, layer_norm_epsilon=config.norm_eps,
        activation_function="gelu_new" if config.activation == "gelu_tanh" else "gelu",
        tie_word_embeddings=config.tie_embeddings, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _from_llama(values: Mapping) -> dict:
    _require(values, "hidden_act", "silu", default="silu")
    _require(values, "attention_bias", False, default=False)
    _require(values, "mlp_bias", False, default=False)
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type: expected 'default', got {kind!r}")
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim")
    if head_dim is not None and head_dim * heads == values["hidden_size"]:
        head_dim = None
    kv_heads = values.get("num_key_value_heads")
    return dict(
        vocab_size=values["vocab_size"], context_length=values.get("max_position_embeddings", 2048),
        num_layers=values["num_hidden_layers"], num_heads=heads, num_kv_heads=None if kv_heads == heads else kv_heads,
        hidden_size=values["hidden_size"], head_size=head_dim,
        intermediate_size=values["intermediate_size"], positions="rotary",
        rotary_base=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))), norm="rms",
        norm_eps=values.get("rms_norm_eps", 1e-6), activation="swiglu", bias=False,
        tie_embeddings=values.get("tie_word_embeddings", False), dropout=0.0,
    )  # fmt: skip


def _to_llama(config: ModelConfig) -> dict:
    _expect(config, "Llama", positions="rotary", norm="rms", bias=False, activation="swiglu")
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.kv_heads, hidden_size=config.hidden_size,
        head_dim=config.head_dim, intermediate_size=config.mlp_size, rms_norm_eps=config.norm_eps,
        # Of transformers 5, and of those before it.
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base}, rope_theta=config.rotary_base,
        hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _llama_split(config: ModelConfig, ours: str) -> list[int]:
    if ours.endswith("qkv.weight"):
        return [heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
    return [config.mlp_size, config.mlp_size]


def _with_bias(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}


LAYOUTS = {
    "gpt2": Layout(
        _from_gpt2, _to_gpt2,
        outside={
            "token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight",
            "head.weight": "lm_head.weight", **_with_bias({"norm": "ln_f"}),
        },
        layer="h.{}",
        block=_with_bias({
            "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
            "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
        }),
        prefix="transformer.",
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
    "llama": Layout(
        _from_llama, _to_llama,
        outside={
            "token_embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight",
            "head.weight": "lm_head.weight",
        },
        layer="layers.{}",
        block={
            "attention_norm.weight": "input_layernorm.weight",
            "attention.qkv.weight": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
            "attention.out.weight": "self_attn.o_proj.weight",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            "mlp.down.weight": "mlp.down_proj.weight",
        },
        prefix="model.",
        split=_llama_split,
    ),
}  # fmt: skip
HEAD = "lm_head.weight"


def _full(layout: Layout, name: str) -> str:
    return name if name == HEAD else layout.prefix + name


def _shards(index: Path) -> list[Path]:
    """The files beside ``index`` that it names, or a ValueError."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("weight_map names files of other folders")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights: {error}") from error
    return [index.parent / name for name in names]


def read_weights(folder: Path, single: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder: of the file ``single``, or of the shards that its index names.

    Raises:
        FileNotFoundError: there is neither, or a shard is missing.
        ValueError: a file cannot be read.
    """
    files = [folder / single]
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = _shards(folder / INDEX)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no model: {file.name} is missing")
        try:
            weights.update(load_file(file))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read (cut short or damaged): {error}") from error
    return weights


def check_layers(weights: Weights, config: ModelConfig) -> None:
    """Raise a ValueError if there are weights of a layer that ``config`` does not have; names one."""
    for name in weights:
        found = _LAYER.search(name)
        layers = config.encoder_layers if "encoder." in name else config.num_layers
        if found and int(found[1]) >= layers:
            raise ValueError(f"{name} is there, and the configuration has {layers} layers")


def to_ours(layout: Layout, weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The state dict of our model from theirs.

    Raises:
        ValueError: a tensor is missing; names it.
    """
    bare = not any(name.startswith(layout.prefix) for name in weights)
    result = {}
    for ours, theirs in layout.ours_and_theirs(config.num_layers).items():
        parts = []
        for name in theirs:
            full = name if bare else _full(layout, name)
            if full not in weights:
                if name == HEAD and config.tie_embeddings:
                    break
                raise ValueError(f"{full} is missing")
            part = weights[full]
            parts.append(part.t() if name.endswith(layout.transposed) else part)
        if parts:
            result[ours] = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return result


def to_theirs(layout: Layout, weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Their tensors from our state dict; a tied head is left out, as transformers leaves it."""
    result = {}
    for ours, theirs in layout.ours_and_theirs(config.num_layers).items():
        if theirs == (HEAD,) and config.tie_embeddings:
            continue
        tensor = weights[ours]
        split = None if len(theirs) == 1 else layout.split
        parts = [tensor] if split is None else tensor.split(split(config, ours))
        for name, part in zip(theirs, parts, strict=True):
            turned = part.t() if name.endswith(layout.transposed) else part
            result[_full(layout, name)] = turned.contiguous()
    return result


def layout_for(config: ModelConfig) -> Layout:
    """The layout that can hold a model of ``config``.

    Raises:
        ValueError: none can; says why for the nearest.
    """
    layout = LAYOUTS["gpt2" if config.positions == "learned" else "llama"]
    layout.to_config(config)
    return layout


class Reader(NamedTuple):
    """How folders of one ``model_type`` are read.

    ``config``: our configuration from the values of config.json and the weights. ``weights``: our state dict from
    theirs and our configuration. Both raise a ValueError that names what does not fit.
    """

    config: Callable[[Mapping, Weights], ModelConfig]
    weights: Callable[[Weights, ModelConfig], dict[str, torch.Tensor]]


def _reader(name: str) -> Reader:
    layout = LAYOUTS[name]
    table = layout.outside["token_embedding.weight"]

    def config(values: Mapping, weights: Weights) -> ModelConfig:
        fields = layout.from_config(values)
        # A file with another head than the table has it untied, whatever its configuration says: so does transformers.
        head, embedding = weights.get(HEAD), weights.get(_full(layout, table), weights.get(table))
        if fields["tie_embeddings"] is True and head is not None and embedding is not None:
            fields["tie_embeddings"] = torch.equal(head, embedding)
        return ModelConfig.from_dict(fields)

    return Reader(config, lambda weights, config: to_ours(layout, weights, config))


# By model_type.
READERS: dict[str, Reader] = {
    **{name: _reader(name) for name in LAYOUTS},
    "bert": Reader(bert_config, bert_weights),
    "t5": Reader(t5_config, t5_weights),
}
