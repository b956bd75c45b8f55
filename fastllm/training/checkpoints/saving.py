"""Saving while training goes on: a copy in host memory, which a thread writes."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from ...data import Tokenizer
from ...files import save_tensors
from ..guard import Failed
from ..objective import TrainedModel
from .checkpoint import OPTIMIZER, Keep, State, save_checkpoint, save_model

# This many checkpoints may fail in a row, because the disk is full or gone, before the run stops.
FAILURES = 3


class NotFinite(Failed):
    """What was to be saved holds an infinity or a NaN."""


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """Room for ``tensor`` in host memory; page-locked for a GPU's, so that the copy need not wait."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


class Snapshot:
    """A copy of a model and of optimiser state in host memory. The room is taken once and used again."""

    def __init__(self, model: TrainedModel):
        self._live = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        # A model of the same kind around other memory: deepcopy takes what its memo holds and copies no tensor.
        memo = {
            key: nn.Parameter(_twin(tensor), requires_grad=False) if isinstance(tensor, nn.Parameter) else _twin(tensor)
            for key, tensor in self._live.items()
        }
        twins = dict(memo)  # deepcopy adds to the memo
        self.model = copy.deepcopy(model, memo)
        self._pairs = [(twins[key], tensor) for key, tensor in self._live.items()]
        self.tensors: dict[str, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the model and ``tensors`` as they are now, in the order of the device's work; the host does not wait."""
        self.tensors = {
            name: self.tensors[name] if name in self.tensors else _twin(tensor) for name, tensor in tensors.items()
        }
        pairs = [*self._pairs, *((self.tensors[name], tensor) for name, tensor in tensors.items())]
        for twin, tensor in pairs:
            twin.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for _, tensor in pairs):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def check(self) -> None:
        """Raise NotFinite, naming the tensor, if there is one that is not finite."""
        for name, tensor in (*self.model.named_parameters(), *self.tensors.items()):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotFinite(f"{name} is not finite: this state is not saved")


class Saver:
    """Checkpoints of a run, written by a thread; one at a time.

    A checkpoint that cannot be written is told of and tried again at the next one: training goes on, and nothing that
    was saved before is touched. After :data:`FAILURES` in a row, or at the end, the error is raised.
    """

    def __init__(
        self, folder: Path, model: TrainedModel, tokenizer: Tokenizer, keep: Keep, tell: Callable[[str], None]
    ):
        self._folder, self._tokenizer, self._keep, self._tell = folder, tokenizer, keep, tell
        self._live = model
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._error: BaseException | None = None
        self._failures = 0
        # The step of the newest checkpoint that is whole.
        self.saved: int | None = None
        # The step that is being written.
        self.saving: int | None = None

    def save(self, state: State, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy model, ``tensors`` and ``state``, and write them while the caller goes on.

        Waits for the one before. Raises as :meth:`wait` does.
        """
        self.wait(final=False)
        if self._snapshot is None:
            self._snapshot = Snapshot(self._live)
        snapshot = self._snapshot
        snapshot.take(tensors)
        self.saving = state.step
        self._start(self._write, snapshot, state.copy())

    def _start(self, write: Callable[..., None], *arguments: object) -> None:
        """Call ``write`` in a thread."""

        def run() -> None:
            try:
                write(*arguments)
            finally:
                self._written.set()

        self._written.clear()
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot, state: State) -> None:
        try:
            snapshot.wait()
            snapshot.check()
            save_checkpoint(self._folder, state, functools.partial(self._fill, snapshot), self._keep)
            self.saved = state.step
        except BaseException as error:  # raised again where it is waited for
            self._error = error

    def _fill(self, snapshot: Snapshot, folder: Path) -> None:
        save_model(folder, snapshot.model, self._tokenizer)
        save_tensors(snapshot.tensors, folder / OPTIMIZER)

    def poll(self) -> None:
        """Tell of a checkpoint that failed, as soon as it has; raises as :meth:`wait` does."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait(final=False)

    def wait(self, final: bool = True) -> None:
        """Until the checkpoint that is being written is there.

        Raises:
            OSError: it could not be written, and it was the last one or the third in a row.
            NotFinite: its weights are not finite.
        """
        if self._thread is not None:
            # A signal that comes during Thread.join makes Python 3.11 take the thread for ended, and not wait for it at
            # exit: it would be killed while it writes.
            self._written.wait()
            self._thread.join()
            self._thread = self.saving = None
            self._failures = self._failures + 1 if self._error is not None else 0
        error, self._error = self._error, None
        if error is None:
            return
        if final or self._failures >= FAILURES or not isinstance(error, OSError):
            raise error
        self._tell(f"checkpoint not saved: {error}; training goes on, the next one tries again")
