"""A model's folder: config.json and model.safetensors, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import check_path
from ..files import save_tensors, sync_folder
from .config import ModelConfig
from .hugging_face import READERS, check_layers, layout_for, read_weights, to_theirs

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained(torch.nn.Module):
    """A module with a dataclass ``config``, save_pretrained and from_pretrained."""

    config_class = ModelConfig
    config: ModelConfig
    # Whether from_pretrained also reads folders of transformers' whose model is of another class, and returns that.
    reads_all = False

    def __init__(self, *args, **kwargs):  # a class's own configuration, or what the next base takes
        super().__init__(*args, **kwargs)

    @staticmethod
    def fits(config) -> bool:
        """Whether a configuration asks for this class."""
        raise NotImplementedError

    @classmethod
    def _check_fits(cls, config) -> None:
        if not cls.fits(config):
            raise ValueError(f"{cls.__name__}: not encoder {config.encoder!r} and decoder {config.decoder!r}")

    def num_parameters(self) -> int:
        """Parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike, *, layout: str = "fastllm") -> None:
        """Write config.json and model.safetensors into ``folder``, which is made if need be.

        Both are written aside and renamed when they are on the disk, the weights first: a folder with a readable
        config.json has whole weights. A shared parameter is stored once.

        Args:
            layout: "fastllm", or "transformers" for names and a configuration that transformers loads as GPT-2 or
                Llama (decoders of one of these shapes); :meth:`from_pretrained` reads both.

        Raises:
            TypeError: ``folder`` is no path.
            ValueError: transformers has no class for this shape; says which setting it is.
            OSError: the folder cannot be written; nothing in it has changed then.
        """
        if layout not in ("fastllm", "transformers"):
            raise ValueError(f"save_pretrained: layout must be fastllm or transformers, got {layout!r}")
        foreign = layout_for(self.config) if layout == "transformers" else None
        check_path("folder", folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            tied = tied_names(self)
            weights = {name: tensor for name, tensor in self.state_dict().items() if name not in tied}
            config = {"architecture": type(self).__name__, **dataclasses.asdict(self.config)}
            if foreign is not None:
                weights, config = to_theirs(foreign, self.state_dict(), self.config), foreign.to_config(self.config)
            save_tensors(weights, staging / WEIGHTS)
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                with open(staging / name, "rb") as file:
                    os.fsync(file.fileno())
            for name in (WEIGHTS, CONFIG):
                os.replace(staging / name, folder / name)
            sync_folder(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> Any:
        """The model in ``folder``, in evaluation mode: what :meth:`save_pretrained` wrote, or transformers.

        Of transformers' models, those of ``model_type`` gpt2, llama, bert and t5 (:data:`hugging_face.READERS`), from
        safetensors in one file or in shards. Parameters are fp32 whatever the files hold. ``Transformer`` reads them
        all; a BERT is then an ``Encoder``, a T5 an ``EncoderDecoder``.

        Raises:
            FileNotFoundError: config.json or model.safetensors is missing.
            TypeError: ``folder`` is no path.
            ValueError: one of them cannot be read, or they do not fit each other, or the model has a setting that this
                class does not.
        """
        check_path("folder", folder)
        folder = Path(folder)
        foreign = _foreign_values(folder / CONFIG)
        if foreign is not None:
            return cls._from_transformers(folder, foreign).to(device).eval()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
        try:
            values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            architecture = values.pop("architecture")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / CONFIG} is not a model's configuration: {error}") from error
        if architecture != cls.__name__:
            raise ValueError(f"{folder / CONFIG} describes a {architecture}, not a {cls.__name__}")
        try:
            model = cls(cls.config_class.from_dict(values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        _load(model, read_weights(folder, WEIGHTS), folder / WEIGHTS)
        return model.to(device).eval()

    @classmethod
    def _from_transformers(cls, folder: Path, values: dict):
        reader = READERS[values["model_type"]]
        if values.get("quantization_config") is not None:
            raise ValueError(f"{folder / CONFIG}: quantization_config: expected none; quantised weights are not read")
        weights = read_weights(folder, WEIGHTS)
        try:
            config = reader.config(values, weights)
        except KeyError as error:
            raise ValueError(f"{folder / CONFIG}: {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        found = model_class(config)
        if cls is not found and not cls.reads_all:
            raise ValueError(f"{folder / CONFIG} describes a {found.__name__}, not a {cls.__name__}")
        try:
            check_layers(weights, config)
            converted = reader.weights(weights, config)
        # torch's error for parts of other shapes, which cannot be put together.
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} does not fit its config: {error}") from error
        return _load(found(config), converted, folder)


# The classes that a configuration may ask for.
CLASSES: list[type[Pretrained]] = []


AnyPretrained = TypeVar("AnyPretrained", bound=Pretrained)


def concrete(cls: type[AnyPretrained]) -> type[AnyPretrained]:
    """Adds a class to :data:`CLASSES`."""
    CLASSES.append(cls)
    return cls


def model_class(config) -> type[Pretrained]:
    """The class for ``config.encoder`` and ``config.decoder``."""
    return next(cls for cls in CLASSES if cls.fits(config))


def tied_names(model: torch.nn.Module) -> set[str]:
    """The further names of parameters that have several; a folder has such a parameter under its first name alone."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: Path) -> torch.nn.Module:
    """``model`` with ``weights``. Only names of shared parameters may be missing in them."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # its scale would be missing
            raise ValueError(f"{source}: {name} is {tensor.dtype}; quantised weights are not read")
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit its config: {error}") from error
    missing = sorted(set(missing) - tied_names(model))
    if missing or unexpected:
        raise ValueError(f"{source} does not fit its config: missing {missing}, unexpected {unexpected}")
    return model


def _foreign_values(path: Path) -> dict | None:
    """A configuration of one of transformers' models that we read; None for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if "architecture" not in values and values.get("model_type") in READERS else None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
