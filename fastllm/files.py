"""Files and folders that are written whole or not at all: a temporary name beside the target, fsync, rename.

And readers of what others may have written: bounded in size, of one known form, with one error that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import InputError

# A JSON file that describes a run or a checkpoint has a few KiB; reading a longer one would only serve to fill memory.
JSON_LIMIT = 1 << 20


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` last. Windows cannot open folders and has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError in the block that names no file (a full disk's does not) is raised as one that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write (and seek in) that becomes ``path`` when the block ends, and leaves no trace if it raises.

    Raises:
        OSError: the disk is full, the folder is missing or read-only; names ``path``.
    """
    path = Path(path)
    temporary = _temporary(path)
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def folder_to_fill(path: str | os.PathLike, new: bool = False) -> Iterator[Path]:
    """``path``, made with the folders above it and tried; if the block raises, what was not there before goes again.

    Args:
        new: it must not be there yet.

    Raises:
        InputError: it cannot be written there.
    """
    folder = Path(path)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=not new)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
        yield folder
    except BaseException:
        if made:
            shutil.rmtree(made[-1], ignore_errors=True)
        raise


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors has an error of its own for that.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Its header is checked against the file's size before anything is allocated.

    Raises:
        InputError: missing, cut short, or not a safetensors file; names it.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    # A dtype that torch lacks is a KeyError in safetensors, too large a shape a RuntimeError or ValueError.
    except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from error


def read_json(path: str | os.PathLike, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        InputError: missing, longer, not JSON, or not an object; names it.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{path}: damaged: longer than {limit:,} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged: a JSON object was expected")
    return value


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill that becomes ``path`` when the block ends, and leaves no trace if it raises.

    Every file in it reaches the disk before the rename. A folder that is there already is replaced.

    Raises:
        OSError: as for :func:`whole_file`.
    """
    path = Path(path)
    temporary = _temporary(path)
    with naming(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
            sync_folder(temporary)
            if path.exists():
                # A folder cannot be renamed onto one that has files; between the two renames only the old
                # one under its temporary name exists, complete.
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)
