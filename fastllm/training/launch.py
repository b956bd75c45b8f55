"""Beginning a run and going on with one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ..config import InputError, build_settings, check_kind, check_path
from ..data.dataset import SUMMARY as CORPUS
from ..files import folder_to_fill, sole_writer, write_text
from ..tasks.store import SUMMARY as EXAMPLES
from .checkpoints.checkpoint import MANIFEST, checkpoints, find_checkpoint
from .config import RunConfig, TrainingConfig, read_run_config
from .device import pick_device
from .parallel.ranks import ALONE, Ranks, launched
from .recipes import BUDGET
from .reports.progress import METRICS, Display, find_wandb
from .run import CONFIG, SESSIONS, Result, Run, fixed_settings
from .session import train_run
from .setup import fitted, open_data, reopen_data, with_pretrained, with_teacher

RUNS = Path("runs")
# The file that a run writes first, and the names of what it writes after it.
LOCK = "lock"
SUMMARIES = (CORPUS, EXAMPLES)
WRITTEN = (CONFIG, "data", "checkpoints", "model", METRICS, SESSIONS, "skipped", "loss.png", "samples.txt")


def train(
    config: RunConfig, folder: str | Path | None = None, *, quiet: bool = False, auto_resume: bool = False
) -> Result:
    """Train from scratch in ``folder``. It is created, and must not hold a run yet. None: the next free runs/NNNN.

    Args:
        auto_resume: resume the run that ``folder`` holds, if there is one with these settings. Processes that torchrun
            started always do, so a restart needs no other command.

    Raises:
        InputError: the settings, the text or the folder do not allow it. Nothing has been trained then.
        TypeError: an argument is of another kind.
        Diverged: too many steps in a row had a loss that was not finite.
        OSError: something cannot be written.
    """
    check_kind("config", config, RunConfig, "a RunConfig")
    if folder is not None:
        check_path("folder", folder)
    if launched() and folder is None:
        raise InputError("--out: under torchrun the run needs a name, by which a restart finds it")
    config = with_teacher(with_pretrained(config)).without_unused()
    if folder is not None and checkpoints(Path(folder) / "checkpoints"):
        if not (auto_resume or launched()):
            raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
        changes = _changes(config, Path(folder) / CONFIG)
        newer = _newer_data(config, Path(folder))
        if newer is not None and int(os.environ.get("RANK", "0")) == 0:
            Display(quiet).warn(
                f"{newer}: newer than what {folder} read of it; the run goes on with what it read; another --out "
                "trains on what is there now"
            )
        return resume(folder, changes, quiet=quiet)
    pick_device(config.training.device)
    find_wandb(config.training.wandb)
    with _joined(config.training) as ranks, contextlib.ExitStack() as held:
        _check_ranks(config, ranks)
        main = ranks.rank == 0
        place = _new_folder(folder, held) if main else contextlib.nullcontext((Path(folder or ""), lambda: None))
        with place as (folder, keep_lock):
            display = Display(quiet or not main)
            with ranks.first():
                data = folder / "data"
                dataset = open_data(config, data, display.say) if main else reopen_data(config, data)
            run = Run(fitted(config, dataset), folder, dataset, display, None, ranks, keep_lock=keep_lock)
            if main:
                write_text(folder / CONFIG, run.config.to_toml())
            measured = run.measure()
        return train_run(run, measured)


def _changes(config: RunConfig, path: Path) -> dict[str, object]:
    """What ``config`` asks for beyond the settings in ``path``, all of which may change on the way.

    Raises:
        InputError: something that may not.
    """
    before = read_run_config(path)
    given, old = asdict(config.training), asdict(before.training)
    if all(given[name] is None for name in BUDGET):
        given.update({name: old[name] for name in BUDGET})
    elif given["epochs"] is None:
        given["epochs"] = old["epochs"]  # another budget takes their place
    elif given["steps"] is None:
        given["steps"] = old["steps"]  # which that run's data made of its epochs
    fixed = fixed_settings(before.training)
    # The vocabulary and the labels come from the data.
    model = before.model
    same_model = replace(config.model, vocab_size=model.vocab_size, labels=model.labels) == model
    same_objective = config.objective == before.objective
    for name, same in (
        ("data", config.data == before.data), ("model", same_model), ("objective", same_objective),
        *((key, given[key] == fixed[key]) for key in fixed)
    ):  # fmt: skip
        if not same:
            raise InputError(f"{path}: {name} of the run that is there is another; choose another --out")
    return {name: value for name, value in given.items() if value != old[name]}


def _newer_data(config: RunConfig, run: Path) -> Path | None:
    """A file that ``config`` names, or that is in a folder which it names, changed since ``run`` read its data.

    By the times that the file system has, as make does, so that nothing is read. Tokens that are used where they are
    have a SHA-256, which is compared elsewhere.
    """
    filled = [path.stat().st_mtime_ns for path in ((run / "data" / name) for name in SUMMARIES) if path.exists()]
    held_out = config.objective.held_out
    for path in map(Path, [*config.data.data, *(held_out.split(",") if held_out else ())]):
        if not filled or (path / CORPUS).exists():
            continue
        for file in path.rglob("*") if path.is_dir() else (path,):
            # What is gone, or cannot be looked at, is not needed any more.
            with contextlib.suppress(OSError):
                newer = file.is_file() and file.stat().st_mtime_ns > max(filled)
                if newer and run.resolve() not in file.resolve().parents:
                    return file
    return None


def _joined(training: TrainingConfig) -> contextlib.AbstractContextManager[Ranks]:
    """What a run trains on: the ranks that torchrun started, or this process."""
    if not launched() and training.parallel == "ddp" and training.tensor_parallel == 1:
        return contextlib.nullcontext(ALONE)
    # Imported here: torch's distributed packages take a second that a single process need not wait for.
    from .parallel.distributed import joined

    return joined(training)


def _check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raises InputError where ``ranks`` cannot train that model: before anything is written."""
    objective, model = config.objective, config.model
    if objective.lora_rank and ranks.size > 1:
        raise InputError(f"lora_rank: adapters are trained by one process, not by {ranks.size}")
    if config.training.tensor_parallel > 1:
        if model.encoder != "none" or model.decoder != "transformer":
            raise InputError(
                "tensor_parallel: splits the vocabulary of a Transformer decoder alone, got encoder "
                f"{model.encoder} and decoder {model.decoder}"
            )
        # Learned positions and segments are looked up together with the tokens, and scaled with them. The loss of a
        # split head has no scale; dpo's log-probabilities have.
        needed = {"positions": "rotary", "scale_embeddings": False, "segments": 0}
        if objective.objective != "dpo":
            needed["logit_scale"] = 1.0
        for name, value in needed.items():
            if (got := getattr(model, name)) != value:
                raise InputError(f"tensor_parallel: needs {name} {value}, got {got}")


@contextlib.contextmanager
def _new_folder(folder: str | Path | None, held: contextlib.ExitStack) -> Iterator[tuple[Path, Callable[[], None]]]:
    """``folder``, or the next free one in runs, made; locked until ``held`` ends, and what locks it again.

    If the block raises, the folder goes again.

    Raises:
        InputError: it cannot be written, another process trains in it, or it holds what a new run would overwrite.
    """
    with contextlib.ExitStack() as stack:
        path = None if folder is None else stack.enter_context(folder_to_fill(folder))
        while path is None:
            with contextlib.suppress(FileExistsError):  # another process was faster to take the number
                path = stack.enter_context(folder_to_fill(_next_run(), new=True))
        is_run = (path / LOCK).exists() or (path / SESSIONS).exists()
        found = [name for name in WRITTEN if os.path.lexists(path / name)]
        if found and not is_run:
            raise InputError(f"{path}: holds {found[0]}, which belongs to no run; choose another --out")
        keep_lock = held.enter_context(sole_writer(path, LOCK))
        if checkpoints(path / "checkpoints") or (path / "model" / MANIFEST).exists():
            raise InputError(f"{path}: holds a trained model already; choose another --out")
        try:
            yield path, keep_lock
        except BaseException:
            if not is_run and not any(os.path.lexists(path / name) for name in WRITTEN):
                (path / LOCK).unlink(missing_ok=True)
            raise


def _next_run() -> Path:
    numbers = [int(path.name) for path in RUNS.glob("[0-9]*") if re.fullmatch("[0-9]+", path.name)]
    return RUNS / f"{max(numbers, default=0) + 1:04d}"


def resume(checkpoint: str | Path, changes: Mapping[str, object] | None = None, *, quiet: bool = False) -> Result:
    """Resume a run, exactly as if it had not stopped.

    Args:
        checkpoint: the run's folder (its newest checkpoint is taken), or one checkpoint in it.
        changes: fields of TrainingConfig marked ``resume``, with new values; they are saved with the run.

    Raises:
        InputError: there is no complete checkpoint, or the run's folder does not fit it.
        TypeError: an argument is of another kind.
        Diverged, OSError: as for :func:`train`.
    """
    check_path("checkpoint", checkpoint)
    if changes is not None:
        check_kind("changes", changes, Mapping, "a mapping of settings")
    path = find_checkpoint(checkpoint).resolve()
    folder = path.parent.parent if path == Path(checkpoint).resolve() else Path(checkpoint)
    config = read_run_config(folder / CONFIG)
    if changes:
        if config.training.epochs is not None and changes.get("max_seconds") is not None:
            changes = {"steps": None, **changes}  # which the epochs were; the new budget takes their place
        config = replace(config, training=build_settings(TrainingConfig, changes, "command line", config.training))
    # Epochs have become steps when the run began.
    if config.training.steps is None and config.training.max_seconds is None:
        where = "command line" if changes else folder / CONFIG
        raise InputError(f"{where}: steps: without them and max_seconds the run has no end; give one of the two")
    find_wandb(config.training.wandb)
    with _joined(config.training) as ranks, contextlib.ExitStack() as held:
        _check_ranks(config, ranks)
        main = ranks.rank == 0
        keep_lock = held.enter_context(sole_writer(folder, LOCK)) if main else lambda: None
        data, display = reopen_data(config, folder / "data"), Display(quiet or not main)
        run = Run(config, folder, data, display, path, ranks, keep_lock=keep_lock)
        if main:
            write_text(folder / CONFIG, run.config.to_toml())
        return train_run(run, run.measure())
