"""Checkpoints: a folder with the model, the optimisers' state and where the run stands, written whole or not at all.

``checkpoints/step-00000500`` holds what ``save_pretrained`` writes (so it can be generated from), tokenizer.json,
``optimizer.safetensors``, ``state.json``, and ``manifest.json`` with the size and SHA-256 of every file; a run whose
parameters are sharded writes the tensors as ``sharded/*.safetensors`` (:mod:`.sharded`). The folder is filled under
another name, brought to the disk, renamed, and named in ``checkpoints/latest``: that commits it. No
pickle is written or read, no file outside the folder is opened, and nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ...config import InputError
from ...data import Tokenizer
from ...data.digest import file_sha256
from ...files import read_json, read_tensors, remove, whole_folder, write_text
from ...models import Model, ModelConfig, load_model
from ..lora import ADAPTER, has_lora, merged, save_adapter

OPTIMIZER, STATE, MANIFEST, LATEST, SHARDED = (
    "optimizer.safetensors", "state.json", "manifest.json", "latest", "sharded",
)  # fmt: skip


@dataclass
class State:
    """Where a run stands after ``step`` steps.

    ``seconds`` of training, ``tokens`` seen, the ``dtype`` it trains in (measured once, then kept), and the SHA-256
    of the training tokens, from which every batch follows. ``settings``: what may not change when it is resumed.
    ``validation``: the loss of an evaluation at this very step; ``score``: its main score, negative where less is
    better. With patience ``best`` is the best of these up to now and ``waited`` the number of evaluations since it.
    ``skipped`` steps in all, ``in_a_row`` up to now; ``losses`` and ``norms`` of the last accepted steps, by which an
    outlier is known. ``cpu``: what kind the last session trained on, by :func:`fastllm.cpu.kind`; None for another
    device. ``loss_scale``: in float16, the factor of the next step's loss, and how many steps it has held; see
    :mod:`..loss_scale`.
    """

    step: int
    seconds: float
    tokens: int
    dtype: str
    data: str
    settings: dict[str, Any] | None = None
    validation: float | None = None
    score: float | None = None
    best: float | None = None
    waited: int = 0
    skipped: int = 0
    in_a_row: int = 0
    losses: list[float] | None = None
    norms: list[float] | None = None
    cpu: str | None = None
    loss_scale: float | None = None
    scaled_steps: int = 0

    def copy(self) -> State:
        """This state with lists of its own: what a run's next steps do to theirs does not show."""
        return replace(self, losses=self.losses and [*self.losses], norms=self.norms and [*self.norms])


def read_state(path: Path) -> State:
    """``state.json`` of the checkpoint ``path``.

    Raises:
        InputError: missing, or not what :class:`State` holds; names the file.
    """
    values = read_json(path / STATE)

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    def count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    def history(value: object) -> bool:
        return value is None or (isinstance(value, list) and all(map(number, value)))

    holds = {
        "step": count, "tokens": count, "skipped": count, "in_a_row": count, "waited": count,
        "seconds": lambda value: number(value) and value >= 0,
        "dtype": lambda value: value in ("auto", "float32", "bfloat16", "float16"),
        "data": lambda value: isinstance(value, str),
        "settings": lambda value: value is None or isinstance(value, dict),
        **dict.fromkeys(("validation", "score", "best"), lambda value: value is None or number(value)),
        "losses": history, "norms": history,
        "cpu": lambda value: value is None or isinstance(value, str),
        "loss_scale": lambda value: value is None or (number(value) and value > 0), "scaled_steps": count,
    }  # fmt: skip
    for name in ("step", "seconds", "tokens", "dtype", "data"):
        if name not in values:
            raise InputError(f"{path / STATE}: damaged: {name} is missing")
    for name, value in values.items():
        if name not in holds:
            raise InputError(f"{path / STATE}: damaged: unknown entry {name!r}")
        if not holds[name](value):
            raise InputError(f"{path / STATE}: damaged: {name} cannot be {str(value)[:40]}")
    assert set(holds) == {field.name for field in fields(State)}
    return State(**values)


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Weights, configuration and tokenizer into ``folder``: all that generating needs.

    Adapters are merged into the weights, and written beside them.

    Raises:
        OSError: they cannot be written.
    """
    if has_lora(model):
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(model, folder / ADAPTER)
        merged(model).save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in ``folder``, for :func:`check`."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", "utf-8")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``newest`` ones, and the ``best`` ones by validation score."""

    newest: int
    best: int = 0


def save_checkpoint(folder: Path, state: State, write: Callable[[Path], None], keep: Keep) -> Path:
    """Make ``folder/step-<step>`` of what ``write`` puts there, state and manifest; then delete what need not stay.

    Later steps than this one's go too: they belong to a course that the run has left, by resuming from before them.

    Args:
        write: fills the folder that it is given.

    Raises:
        OSError: it cannot be written; names the file. The checkpoints that were there are still whole.
    """
    path = folder / f"step-{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*.tmp"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    with whole_folder(path) as temporary:
        write(temporary)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", "utf-8")
        write_manifest(temporary)
    write_text(folder / LATEST, f"{path.name}\n")
    _prune(folder, path, keep)
    return path


def _prune(folder: Path, newest: Path, keep: Keep) -> None:
    every = checkpoints(folder)
    if newest not in every:
        raise FileNotFoundError(errno.ENOENT, "vanished as soon as it was saved", str(newest))
    here = every.index(newest) + 1
    before = every[:here]
    stay = {*before[-keep.newest :], *(best_first(before)[: keep.best] if keep.best else ())}
    for path in every:
        if path not in stay:
            remove(path)


def best_first(paths: Iterable[Path]) -> list[Path]:
    """Those of the checkpoints ``paths`` that have a validation score, the best one first, of equals the earlier."""
    scores = {}
    for path in paths:
        with contextlib.suppress(InputError):  # a damaged one is nobody's best
            score = read_state(path).score
            if score is not None:
                scores[path] = score
    return sorted(scores, key=lambda path: -scores[path])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, whole or damaged."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]))


def check(path: Path) -> None:
    """Refuse a checkpoint, or another folder with a manifest, that is not just as it was written.

    Only plain files within the folder are opened: no link, no name that leads out of it.

    Raises:
        InputError: names the first file that is missing, cut short, changed, or that should not be there.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except InputError as error:
        raise InputError(f"{error}; not a whole checkpoint") from error
    try:
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path / MANIFEST}: damaged: not a manifest") from error
    for name, (size, sha256) in expected.items():
        parts = PurePosixPath(name).parts
        if name != "/".join(parts) or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
            raise InputError(f"{path / MANIFEST}: damaged: {name!r} is no name of a file in this folder")
        file = path.joinpath(*parts)
        if any(part.is_symlink() for part in (file, *file.parents) if part != path and path in part.parents):
            raise InputError(f"{file}: a link; a checkpoint has plain files only")
        try:
            found = file.stat().st_size if file.is_file() else None
        except (OSError, ValueError):
            found = None
        if found is None:
            raise InputError(f"{file}: damaged: missing")
        if found != size:
            raise InputError(f"{file}: damaged: {size} bytes expected, {found} found")
        if file_sha256(file) != sha256:
            raise InputError(f"{file}: damaged: its SHA-256 does not match the manifest")
    for file in (path / SHARDED).glob("*"):
        if file.relative_to(path).as_posix() not in expected:
            raise InputError(f"{file}: not in the manifest")


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint to go on from: the newest whole one of a run's folder, or ``run`` itself if it is one; checked.

    A damaged one is named in a warning and skipped, and the one before it taken.

    Raises:
        InputError: there is none, or none is whole.
    """
    run = Path(run)
    if (run / MANIFEST).exists() or (run / STATE).exists():
        check(run)
        return run
    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise InputError(f"{run}: no checkpoint to resume from" if run.is_dir() else f"{run}: no such run")
    latest = folder / _latest(folder)
    # What is newer than the pointer was not committed, or belongs to a course that the run has left: it comes last.
    last = found.index(latest) if latest in found else len(found) - 1
    order = [*reversed(found[: last + 1]), *reversed(found[last + 1 :])]
    damage = []
    for path in order:
        try:
            check(path)
        except InputError as error:
            damage.append(str(error))
            continue
        for message in damage:
            warnings.warn(f"{message}; skipped, {path.name} is used", RuntimeWarning, stacklevel=2)
        return path
    raise InputError("; ".join(damage))


def _latest(folder: Path) -> str:
    """What the pointer names; "." where there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError), open(folder / LATEST, encoding="utf-8") as file:
        name = file.read(64).strip()
        if re.fullmatch(r"step-\d{8,18}", name):
            return name
    return "."


def check_settings(checkpoint: Path, saved: Mapping[str, Any] | None, now: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with other settings than the checkpoint was made with.

    Raises:
        InputError: names the first setting that differs, both values, and the file ``where`` that has the new one.
    """
    for name, value in (saved or {}).items():
        if name in now and now[name] != value:
            raise InputError(
                f"{where}: {name} is {now[name]!r}, but {checkpoint} was made with {value!r}; a run keeps its settings"
            )


def load_config(path: Path) -> ModelConfig:
    """The configuration of a checkpoint's model, before anything of its size is allocated.

    Raises:
        InputError: config.json is missing or is none.
    """
    values = read_json(path / "config.json")
    values.pop("architecture", None)
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path / 'config.json'}: {error}") from error


def load_checkpoint(path: Path, device: torch.device) -> tuple[Model, dict[str, torch.Tensor], State]:
    """The model, the optimisers' tensors and the state of a checkpoint that :func:`find_checkpoint` has passed.

    Raises:
        InputError: a file is not what it should be, although its hash is.
    """
    state = read_state(path)
    try:
        model = load_model(path).to(device)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    return model, read_tensors(path / OPTIMIZER), state
