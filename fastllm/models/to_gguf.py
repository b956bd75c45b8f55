"""Decoders of GPT-2's and Llama's shapes as GGUF, the file that llama.cpp and related programs run.

The file format and the names are the package gguf's (by llama.cpp's authors; extra ``gguf``).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..data import Tokenizer
from ..data.optional import require
from .hugging_face import layout_for, to_theirs
from .pretrained import Pretrained

FILE = "model.gguf"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding: pairs side by side.

    Ours turns feature i of a head with feature i + head size / 2, llama.cpp's 2 i with 2 i + 1.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _tensors(gguf, model: Pretrained, architecture: str) -> dict[str, torch.Tensor]:
    """GGUF's names and the tensors, fp32, with (out, in) of a linear layer as its shape."""
    config = model.config
    layout = layout_for(config)
    kind = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    result = {}
    for name, tensor in to_theirs(layout, model.state_dict(), config).items():
        if name.endswith(layout.transposed):
            tensor = tensor.t()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, config.num_heads if name.endswith("q_proj.weight") else config.kv_heads)
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.float().contiguous()
    return result


def _add_shape(writer, config, architecture: str) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(gguf, writer, tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer.definition)
    splitter = definition.get("pre_tokenizer") or {}
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if (
        definition["model"].get("type") != "BPE"
        or not plain
        or splitter.get("add_prefix_space")
        or definition.get("normalizer")
    ):
        raise ValueError("tokenizer: GGUF has byte-level BPE with GPT-2's pieces (fastllm tokenizer train --kind bpe)")
    special = {added["id"] for added in definition["added_tokens"] if added["special"]}
    kinds = gguf.TokenType
    size = tokenizer.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # llama.cpp's own converter names so what no token has.
    missing = {index for index in range(size) if not tokenizer.token(index)}
    writer.add_token_list([f"[PAD{index}]" if index in missing else tokenizer.token(index) for index in range(size)])
    kind_of = dict.fromkeys(special, kinds.CONTROL) | dict.fromkeys(missing, kinds.UNUSED)
    writer.add_token_types([int(kind_of.get(index, kinds.NORMAL)) for index in range(size)])
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    # A document begins and ends with the same token.
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)


def write_gguf(model: Pretrained, tokenizer: Tokenizer, folder: Path, name: str) -> None:
    """Write ``folder/model.gguf``: weights in fp32, shape, and byte-level BPE tokenizer.

    Args:
        name: the model's, for people.

    Raises:
        ValueError: GGUF's GPT-2 and Llama cannot be this model; says which setting it is. Or the tokenizer is of
            another kind.
        InputError: the package gguf is not installed.
        OSError: the file cannot be written; names it.
    """
    config = model.config
    architecture = layout_for(config).to_config(config)["model_type"]
    if config.activation == "gelu":
        raise ValueError("GGUF's GPT-2 needs activation 'gelu_tanh' (here 'gelu')")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"tokenizer: {tokenizer.vocab_size} tokens, the model has {config.vocab_size}")
    gguf = require("gguf", "gguf", "export --format gguf", extra="gguf")
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        _add_shape(writer, config, architecture)
        _add_tokenizer(gguf, writer, tokenizer)
        for key, tensor in _tensors(gguf, model, architecture).items():
            writer.add_tensor(key, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        # NumPy's for a full disk has neither number nor name: "20480 requested and 176 written".
        raise OSError(f"cannot write {folder / FILE}: {error}") from error
    finally:
        writer.close()
