"""A model's folder: config.json and model.safetensors, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from ..files import save_tensors, sync_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained:
    """Adds save_pretrained and from_pretrained to a module with a dataclass ``config``."""

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into ``folder``, which is made if need be.

        Both are written aside and renamed when they are on the disk, the weights first: a folder with a readable
        config.json has whole weights. A shared parameter is stored once.

        Raises:
            OSError: the folder cannot be written; nothing in it has changed then.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            shared = {id(p): name for name, p in reversed(list(self.named_parameters(remove_duplicate=False)))}
            names = set(shared.values())
            weights = {
                name: tensor
                for name, tensor in self.state_dict().items()
                if name in names or name not in dict(self.named_parameters(remove_duplicate=False))
            }
            save_tensors(weights, staging / WEIGHTS)
            config = {"architecture": type(self).__name__, **dataclasses.asdict(self.config)}
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
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu"):
        """The model that :meth:`save_pretrained` wrote into ``folder``, in evaluation mode.

        Raises:
            FileNotFoundError: config.json or model.safetensors is missing.
            ValueError: one of them cannot be read, or they do not fit each other.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
        try:
            values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            architecture = values.pop("architecture")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} is not a model's configuration: {error}") from error
        if architecture != cls.__name__:
            raise ValueError(f"{folder / CONFIG} describes a {architecture}, not a {cls.__name__}")
        try:
            model = cls(cls.config_class.from_dict(values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
        try:
            weights = load_file(folder / WEIGHTS)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / WEIGHTS} cannot be read (cut short or damaged): {error}") from error
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = {name for name, p in model.named_parameters(remove_duplicate=False)} - {
            name for name, p in model.named_parameters()
        }
        missing = [name for name in missing if name not in tied]
        if missing or unexpected:
            raise ValueError(f"{folder / WEIGHTS} does not fit its config: missing {missing}, unexpected {unexpected}")
        return model.to(device).eval()
