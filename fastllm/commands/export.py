"""Write a trained model for use elsewhere: safetensors, config.json and tokenizer.json, as transformers loads them or
as fastllm does, or one GGUF file for llama.cpp. A checkpoint that is in parts becomes whole."""

from __future__ import annotations

import argparse
import json
import os

import torch

from ..config import InputError, path
from ..data import Tokenizer
from ..files import folder_to_fill, whole_folder, write_text
from ..models import build_model, load_model
from ..models.pretrained import Pretrained
from ..models.to_gguf import write_gguf
from ..training.checkpoints.checkpoint import SHARDED, load_config, write_manifest
from ..training.checkpoints.model_folder import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN", help="a run's folder, one of its checkpoints, or a model's")
    parser.add_argument("out", type=path, metavar="FOLDER", help="where to write; must not exist")
    parser.add_argument(
        "--format", choices=("safetensors", "gguf"), default="safetensors",
        help="gguf: model.gguf, weights in fp32; for decoders of GPT-2's and Llama's shapes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=("transformers", "fastllm"),
        help="of safetensors: whose names and configuration (default: transformers)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if os.path.lexists(arguments.out):
        raise InputError(f"{arguments.out}: is there already")
    if arguments.format == "gguf" and arguments.layout:
        raise InputError("--layout: GGUF has its own; it goes with --format safetensors only")
    folder = model_folder(arguments.model)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    try:
        if (folder / SHARDED).exists():
            from ..training.checkpoints.sharded import load_whole

            model, _ = load_whole(folder, lambda: build_model(load_config(folder)), torch.device("cpu"))
            assert isinstance(model, Pretrained), "what build_model makes"
        else:
            model = load_model(folder)
        with folder_to_fill(arguments.out.parent), whole_folder(arguments.out) as out:
            if arguments.format == "gguf":
                write_gguf(model, tokenizer, out, arguments.out.name)
            else:
                layout = arguments.layout or "transformers"
                model.save_pretrained(out, layout=layout)
                tokenizer.save_pretrained(out)
                if layout == "transformers":
                    # A document begins and ends with the same token; without it their generate would never end.
                    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
                    write_text(out / "generation_config.json", json.dumps(ends, indent=2) + "\n")
                write_manifest(out)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    print(f"{arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")
    return 0
