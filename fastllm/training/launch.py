"""Beginning a run and going on with one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..config import InputError, build
from ..data import load_dataset, open_dataset
from ..files import write_text
from .checkpoint import find_checkpoint
from .config import RunConfig, TrainingConfig, read_run_config
from .loop import CONFIG, Result, Run, pick_device
from .progress import Display

RUNS = Path("runs")


def train(config: RunConfig, folder: str | Path | None = None, *, quiet: bool = False) -> Result:
    """Train from scratch in ``folder``, which is made and must not hold a run yet; None: the next free runs/NNNN.

    Raises:
        InputError: the settings, the text and the folder do not allow it; nothing has been trained then.
        Diverged: the loss is not finite any more.
        OSError: something cannot be written.
    """
    if folder is not None and (Path(folder) / "checkpoints").exists():
        raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    pick_device(config.training.device)
    with _new_folder(folder) as folder:
        display = Display(quiet)
        dataset = load_dataset(config.data, folder / "data", vocab_size=config.model.vocab_size, say=display.say)
        model = replace(config.model, vocab_size=dataset.tokenizer.vocab_size)
        run = Run(replace(config, model=model), folder, dataset, display, None)
        write_text(folder / CONFIG, run.config.to_toml())
        run.measure()
    return run.train()


def _next_run() -> Path:
    numbers = [int(path.name) for path in RUNS.glob("[0-9]*") if path.name.isdigit()]
    return RUNS / f"{max(numbers, default=0) + 1:04d}"


@contextlib.contextmanager
def _new_folder(name: str | Path | None) -> Iterator[Path]:
    """Make the run's folder; if the block raises, remove what was not there before."""
    folder = Path(name) if name is not None else _next_run()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=name is not None)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
        yield folder
    except BaseException:
        if made:
            shutil.rmtree(made[-1], ignore_errors=True)
        raise


def resume(checkpoint: str | Path, changes: Mapping[str, object] | None = None, *, quiet: bool = False) -> Result:
    """Go on with a run, exactly as if it had not stopped.

    Args:
        checkpoint: the run's folder (its newest checkpoint is taken), or one checkpoint in it.
        changes: fields of TrainingConfig marked ``resume``, with new values; they are saved with the run.

    Raises:
        InputError: there is no whole checkpoint, or something of the run's folder does not fit it.
        Diverged, OSError: as for :func:`train`.
    """
    path = find_checkpoint(checkpoint).resolve()
    folder = path.parent.parent if path == Path(checkpoint).resolve() else Path(checkpoint)
    config = read_run_config(folder / CONFIG)
    if changes:
        config = replace(config, training=build(TrainingConfig, changes, "command line", config.training))
    run = Run(config, folder, open_dataset(folder / "data"), Display(quiet), path)
    write_text(folder / CONFIG, run.config.to_toml())
    run.measure()
    return run.train()
