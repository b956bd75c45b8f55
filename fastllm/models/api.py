"""The names of :mod:`fastllm.models`: importing this imports torch."""

import json
from pathlib import Path

from ..config import check_path
from .cache import DecoderCache, Encoded, KVCache, RecurrentCache
from .config import PRESETS, ModelConfig, TransformerConfig
from .encoder import Encoder
from .encoder_decoder import EncoderDecoder
from .pretrained import CLASSES, model_class
from .transformer import RNN, LanguageModel, Transformer

Model = LanguageModel | Encoder | EncoderDecoder


def build_model(config: ModelConfig) -> Model:
    """A new model of this shape, in training mode, on the default device, with weights from torch's generator."""
    model = model_class(config)(config)
    assert isinstance(model, Model)
    return model


def load_model(folder: str | Path, *, device="cpu") -> Model:
    """The model in ``folder``, of any class, in evaluation mode. save_pretrained or transformers wrote the folder.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        TypeError: ``folder`` is no path.
        ValueError: one of them cannot be read, or the two do not fit together.
    """
    check_path("folder", folder)
    classes = {cls.__name__: cls for cls in CLASSES}
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        # Transformer reads every folder of transformers' that can be read.
        name = values.get("architecture", "Transformer" if "model_type" in values else None)
    except FileNotFoundError:
        name = "Transformer"  # whose loader says what is missing
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a model's configuration: {error}") from error
    if name not in classes:
        raise ValueError(f"{path}: architecture: expected one of {', '.join(classes)}; got {name!r}")
    return classes[name].from_pretrained(folder, device=device)


__all__ = [
    "PRESETS",
    "RNN",
    "DecoderCache",
    "Encoded",
    "Encoder",
    "EncoderDecoder",
    "KVCache",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "RecurrentCache",
    "Transformer",
    "TransformerConfig",
    "build_model",
    "load_model",
    "model_class",
]
