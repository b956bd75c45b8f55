"""Which folder a name means."""

from __future__ import annotations

from pathlib import Path

from ...config import InputError
from ...models import LanguageModel, ModelConfig, load_model
from .checkpoint import MANIFEST, check, find_checkpoint, load_config


def model_folder(path: str | Path) -> Path:
    """The folder with weights and tokenizer that ``path`` names: a run's, a checkpoint, or one that holds just these.

    A folder that is none of these is given back as it is: what reads it names the file that is missing.

    Raises:
        InputError: there is none, or its manifest does not fit it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "model").is_dir():
        folder = folder / "model"
    elif (folder / "checkpoints").is_dir() or (folder / "config.toml").exists():
        return find_checkpoint(folder)
    if (folder / MANIFEST).exists():
        check(folder)
    return folder


def language_model_folder(path: str | Path, argument: str) -> tuple[Path, ModelConfig]:
    """The folder that ``path`` names and its model's shape; ``argument`` is what messages begin with.

    Raises:
        InputError: there is none, or its model is no decoder alone.
    """
    folder = model_folder(path)
    shape = load_config(folder)
    if (shape.encoder, shape.decoder != "none") != ("none", True):
        raise InputError(f"{argument}: {folder} is no language model: its encoder is {shape.encoder} and its decoder "
                         f"{shape.decoder}")  # fmt: skip
    return folder, shape


def load_language_model(path: str | Path, argument: str) -> LanguageModel:
    """The language model that ``path`` names, in evaluation mode.

    Raises:
        InputError: as :func:`language_model_folder`; or the model's files do not fit each other.
    """
    folder, _ = language_model_folder(path, argument)
    try:
        model = load_model(folder)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{argument}: {error}") from error
    assert isinstance(model, LanguageModel)  # as its configuration says
    return model
