"""Which folder a name means."""

from __future__ import annotations

from pathlib import Path

from ...config import InputError
from .checkpoint import MANIFEST, check, find_checkpoint


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
