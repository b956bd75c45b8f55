"""Files and folders that are written whole or not at all: a temporary name beside the target, fsync, rename.

And readers of what others may have written: bounded in size, of one known form, with one error that names the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from .config import InputError
from .locks import lock as take_lock

if TYPE_CHECKING:
    import torch

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


def check_plain(path: Path) -> None:
    """Refuse to write to what is there but is no plain file: the superuser may even rename over /dev/null.

    Raises:
        InputError: it is a device, a pipe, a socket or a folder.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: cannot write there: not a file")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write (and seek in) that becomes ``path`` when the block ends, and leaves no trace if it raises.

    Raises:
        InputError: ``path`` is a device, a pipe or a folder, which a rename would replace or cannot.
        OSError: the disk is full, the folder is missing or read-only; names ``path``.
    """
    path = Path(path)
    check_plain(path)
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


def _make_folders(folder: Path, new: bool) -> Iterator[Path]:
    """Make ``folder`` and those above it, and yield each that was not there.

    Raises:
        FileExistsError: ``folder`` is there and must not be, or is no folder.
        OSError: one cannot be made.
    """
    for each in reversed((folder, *folder.parents)):
        # Another process may make the same folders at this moment: its own are not this one's to remove.
        try:
            each.mkdir()
        except FileExistsError:
            if each == folder and (new or not folder.is_dir()):
                raise
        else:
            yield each


@contextlib.contextmanager
def folder_to_fill(path: str | os.PathLike, new: bool = False) -> Iterator[Path]:
    """``path``, made with the folders above it and tried; if the block raises, what it has made goes again.

    Folders above it that other processes have put something into meanwhile stay.

    Args:
        new: it must not be there yet.

    Raises:
        FileExistsError: it is there and must not be.
        InputError: it cannot be written there.
    """
    folder = Path(path)
    made: list[Path] = []
    try:
        try:
            for each in _make_folders(folder, new):
                made.append(each)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            if new and isinstance(error, FileExistsError):
                raise
            # "File exists" would be no news to whoever named a file.
            why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
            raise InputError(f"{folder}: cannot write there: {why}") from error
        yield folder
    except BaseException:
        if folder in made:
            shutil.rmtree(made.pop(), ignore_errors=True)
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _locked(path: Path) -> BinaryIO:
    """The file ``path``, made where it is missing, opened and locked.

    Raises:
        InputError: another process has the lock.
        OSError: the file cannot be written.
    """
    file = open(path, "ab")  # noqa: SIM115, the caller's to close
    if not take_lock(file):
        file.close()
        raise InputError(f"{path.parent}: another process is writing there")
    return file


@contextlib.contextmanager
def sole_writer(folder: Path, name: str) -> Iterator[Callable[[], None]]:
    """Keep other processes that ask for the same off ``folder``; what killed ones were writing there is removed.

    The lock, on the file ``name``, ends with this process however that ends, and is not its children's. Once deleted,
    the file keeps nobody off: the function that the block gets then makes and locks it again. It raises InputError
    where another process was faster, and OSError.

    Raises:
        InputError: another process has the lock, or the folder cannot be written.
    """
    path = folder / name
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(_locked(path))
        except OSError as error:
            raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
        for left in folder.glob(".*.tmp"):
            remove(left)

        def keep() -> None:
            nonlocal file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return
            file = held.enter_context(_locked(path))

        yield keep


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors has an error of its own for that.
    """
    from safetensors.torch import save_file

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
    from safetensors.torch import load_file

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


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that none is missing at any moment; False where the system has no such call."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace(path: Path, temporary: Path) -> None:
    """Rename the folder ``temporary`` to ``path``, in the place of what is there."""
    if not os.path.lexists(path):
        os.replace(temporary, path)
    elif _exchange(temporary, path):
        remove(temporary)
    else:
        # A folder cannot be renamed onto one that has files; between the two renames only the old one under its
        # temporary name exists, complete.
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            os.replace(old, path)
            raise
        remove(old)


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
            _replace(path, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)
