"""Checkpoints: a folder with the model, the optimisers' state and where the run stands, written whole or not at all.

``checkpoints/step-00000500`` holds what ``save_pretrained`` writes (so it can be generated from), tokenizer.json,
``optimizer.safetensors``, ``state.json``, and ``manifest.json`` with the size and SHA-256 of every file. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..config import InputError
from ..data import Tokenizer
from ..files import save_tensors, whole_folder
from ..models import Transformer
from .optimizer import Optimizers

OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"


@dataclass
class State:
    """Where a run stands after ``step`` steps.

    ``seconds`` of training, ``tokens`` seen, the ``dtype`` it trains in (measured once, then kept), and the SHA-256
    of the training tokens, from which every batch follows.
    """

    step: int
    seconds: float
    tokens: int
    dtype: str
    data: str


def save_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Weights, configuration and tokenizer into ``folder``: all that generating needs.

    Raises:
        OSError: they cannot be written.
    """
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in ``folder``, for :func:`check`."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, model: Transformer, tokenizer: Tokenizer, optimizers: Optimizers, state: State, keep: int
) -> Path:
    """Write ``folder/step-<step>``, then delete all but the ``keep`` newest.

    Later steps than this one's go too: they belong to a course that the run has left, by resuming from before them.

    Raises:
        OSError: it cannot be written; names the file. The checkpoints that were there are still whole.
    """
    path = folder / f"step-{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*.tmp"):  # by a process that was killed while it wrote
        shutil.rmtree(left)
    with whole_folder(path) as temporary:
        save_model(temporary, model, tokenizer)
        save_tensors(optimizers.state_dict(), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", "utf-8")
        write_manifest(temporary)
    every = checkpoints(folder)
    here = every.index(path) + 1
    for other in every[: max(0, here - keep)] + every[here:]:
        shutil.rmtree(other)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, whole or damaged."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def check(path: Path) -> None:
    """Refuse a checkpoint, or another folder with a manifest, that is not just as it was written.

    Raises:
        InputError: names the first file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: {error.strerror}; not a whole checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / MANIFEST}: damaged: not a manifest") from error
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: damaged: missing")
        if file.stat().st_size != size:
            raise InputError(f"{file}: damaged: {size} bytes expected, {file.stat().st_size} found")
        if _sha256(file) != sha256:
            raise InputError(f"{file}: damaged: its SHA-256 does not match the manifest")


def find_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run's folder, or ``run`` itself if it is one; checked.

    Raises:
        InputError: there is none, or it is damaged. An older one that is whole is named, never taken silently.
    """
    run = Path(run)
    if (run / MANIFEST).exists() or (run / STATE).exists():
        check(run)
        return run
    found = checkpoints(run / "checkpoints")
    if not found:
        raise InputError(f"{run}: no checkpoint to resume from" if run.is_dir() else f"{run}: no such run")
    try:
        check(found[-1])
    except InputError as error:
        for older in reversed(found[:-1]):
            try:
                check(older)
            except InputError:
                continue
            raise InputError(f"{error}; {older} is whole and can be resumed from") from error
        raise
    return found[-1]


def load_checkpoint(path: Path, device: torch.device) -> tuple[Transformer, dict[str, torch.Tensor], State]:
    """The model, the optimisers' tensors and the state of a checkpoint that :func:`find_checkpoint` has passed."""
    model = Transformer.from_pretrained(path).to(device)
    state = State(**json.loads((path / STATE).read_text("utf-8")))
    return model, load_file(path / OPTIMIZER), state
