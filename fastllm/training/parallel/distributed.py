"""Several processes that train one model, on torch's own engine: DDP, FSDP2, and a vocabulary split over processes.

``torchrun --nproc-per-node N -m fastllm train --out runs/x`` starts them. Every rank knows the whole batch, which is a
function of (data, seed, step), and computes its own rows: the batch of a step is the same at any number of ranks, and
so are loss and gradient, but for the order in which floating-point numbers are added.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...config import InputError
from ...data import Tokenizer
from ..checkpoints.checkpoint import Keep
from ..checkpoints.saving import Saver
from ..checkpoints.sharded import ShardedSaver, read_sharded, whole_model
from ..config import TrainingConfig
from ..device import narrow_dtype
from ..guard import Failed
from ..objectives import Objective
from .meta import copy_part, on_meta
from .ranks import ALONE, Ranks, launched, shares
from .vocab_parallel import split_vocabulary
from .watch import Watch

_lives = itertools.count()


def _check_processes(training: TrainingConfig, size: int) -> None:
    """Raises InputError where the settings do not fit ``size`` processes."""
    parts = training.tensor_parallel
    if not launched() and (training.parallel == "fsdp" or parts > 1):
        several = "parallel: fsdp" if training.parallel == "fsdp" else f"tensor_parallel: {parts}"
        raise InputError(f"{several} needs torchrun (torchrun --nproc-per-node N -m fastllm train ...)")
    if size % parts:
        raise InputError(f"tensor_parallel: {parts} does not divide the {size} processes")
    if parts > 1 and training.parallel == "fsdp":
        raise InputError("tensor_parallel: goes with parallel ddp only; FSDP shards embedding and head itself")
    groups, rows = size // parts, training.micro_batch_size or 1
    if training.batch_size % (groups * rows):
        raise InputError(
            f"batch_size: {training.batch_size} is not a multiple of {groups} processes x micro_batch_size {rows}"
        )


@contextlib.contextmanager
def _process_group(size: int, timeout: timedelta, cuda: bool) -> Iterator[None]:
    """torch's default group of ``size`` processes; a caller's own serves as well, and stays."""
    if dist.is_initialized():
        yield
        return
    found = dist.rendezvous("env://", timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]  # documented there
    store, rank, _ = next(found)
    # torchrun's store outlives a restart: without a name of its own, a life would read the addresses of the last.
    life = f"fastllm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_lives)}"
    own = dist.PrefixStore(life, store)  # pyright: ignore[reportPrivateImportUsage]  # documented there
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backends, store=own, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _own_gpu() -> int:
    """The index of this process's GPU: that of its place on the machine, or the only one that a scheduler shows it.

    Raises:
        InputError: the machine has fewer GPUs than processes.
    """
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if count == 1:
        return 0
    if place >= count:
        raise InputError(f"LOCAL_RANK: expected less than {count}, the GPUs of this machine, got {place}")
    return place


@contextlib.contextmanager
def joined(training: TrainingConfig) -> Iterator[Ranks]:
    """This process's place among those that torchrun started; on its own if there is one only.

    Raises:
        InputError: the settings do not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1
    _check_processes(training, size)
    if size == 1 and training.parallel != "fsdp":
        yield ALONE
        return
    cuda = training.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_own_gpu())
    with _process_group(size, timedelta(seconds=2 * training.hang_timeout + 60), cuda):
        kind = {"ddp": DataParallel, "fsdp": FullySharded}[training.parallel]
        if training.tensor_parallel > 1:
            kind = VocabParallel
        ranks = kind(training, "cuda" if cuda else "cpu")
        try:
            yield ranks
        except RuntimeError as error:
            # Neither gloo nor NCCL has a class for it that both torch 2.11 and 2.13 raise.
            if isinstance(error, Failed) or not re.search("gloo|nccl|peer|Connection", str(error), re.IGNORECASE):
                raise
            # A rank that ended for a standstill closes its connections: the cause is what it has said.
            text = ranks.standstill() or " ".join(str(error).split())[:200]
            raise RankLost(f"rank {ranks.rank}: another process has died or cannot be reached ({text})") from error
        ranks.close()


class RankLost(Failed):
    """Another rank does not answer any more."""


class WeightedLoss(nn.Module):
    """A model whose forward is what ``compute`` makes of it: what DDP and FSDP2 put their hooks on.

    The objective's weighted terms, of a batch that these engines do not see: they would move all of it to their device.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], dict[str, torch.Tensor]]):
        return compute(self.model)


class Group(Ranks):
    """What all ways of training together share."""

    def __init__(self, training: TrainingConfig, device_type: str):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._training, self._device_type = training, device_type
        self.parts, self.part = self.size, self.rank
        # As both of torch's engines do.
        self.averaged = self.size
        # The ranks that see other rows of a batch; None: all of them.
        self._data_group: dist.ProcessGroup | None = None
        # The saving thread has a group of its own: its messages cannot meet the step's.
        self.quiet: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        # Numbers of the host; a caller's own default group may be NCCL's alone.
        self._of_hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * training.hang_timeout + 60))
        self._watch = Watch(self.rank, self.size, training.hang_timeout)
        # What an engine of torch's has put its hooks on, once there is a model; None without an engine.
        self._module: Any = None

    def device(self, device: torch.device) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    def dtype(self, dtype: str) -> str:
        # A trial needs the whole model; all ranks have to choose alike.
        if dtype != "auto":
            return dtype
        return "float32" if self._device_type == "cpu" else narrow_dtype(torch.device(self._device_type)) or "float32"

    def shares(self, losses, model, batch, weights, elsewhere):
        if self._module is None:
            return super().shares(losses, model, batch, weights, elsewhere)
        return self._module(lambda whole: shares(losses, whole, batch, weights, elsewhere))

    def sum_(self, values: Sequence[torch.Tensor]) -> None:
        packed = torch.stack([value.float() for value in values])
        dist.all_reduce(packed, group=self._data_group)
        for value, total in zip(values, packed.unbind(), strict=True):
            value.copy_(total)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._of_hosts)
        return [one.tolist() for one in every]

    def first(self) -> AbstractContextManager:
        return _first(self.rank)

    def beat(self, step: int, phase: str) -> None:
        self._watch.beat(step, phase)

    def standstill(self) -> str | None:
        """Why a rank ended that waited too long, if one has."""
        return self._watch.verdict()

    def close(self) -> None:
        """Wait for every rank's end."""
        self._watch.close()
        dist.barrier(group=self.quiet)


_calls = itertools.count()


@contextlib.contextmanager
def _first(rank: int) -> Iterator[None]:
    """Rank 0 runs the block before the others do; if it fails, they fail as well."""
    store = dist.distributed_c10d._get_default_store()
    key = f"fastllm/first/{next(_calls)}"
    if rank == 0:
        try:
            yield
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return
    store.wait([key], timedelta(days=1))
    if store.get(key) != b"done":
        raise InputError("rank 0 could not prepare the run; its message says why")
    yield


class DataParallel(Group):
    """DDP: the whole model on every rank. Checkpoints are those of a single process; the first rank writes them."""

    def describe(self) -> str:
        return f", {self.size} ranks (DDP)"

    def attach(self, model: nn.Module, objective: Objective) -> None:
        cuda = self._device_type == "cuda"
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows no other name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            self._module = DistributedDataParallel(
                WeightedLoss(model),
                device_ids=[torch.cuda.current_device()] if cuda else None,
                # Every parameter gets a gradient in every part: a model has the heads of its objective alone, and a
                # term without targets is computed elsewhere (step.py). So DDP need not look for parameters without one.
                broadcast_buffers=False,
            )

    def exchange(self, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext() if last else self._module.no_sync()

    def saver(self, folder, model, tokenizer, keep, tell):
        return Saver(folder, model, tokenizer, keep, tell) if self.rank == 0 else Spectator()


class Spectator(Saver):
    """The saver of a rank that writes nothing."""

    def __init__(self):
        self.saved = self.saving = None

    def save(self, state, tensors) -> None:
        self.saved = state.step

    def poll(self) -> None:
        pass

    def wait(self, final: bool = True) -> None:
        pass


class Sharded(Group):
    """Ranks that each hold a part of the model's tensors, write their own parts, and make the whole model together."""

    def copy(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
        copy_part(parameter, whole)

    def whole(self, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module | None:
        return whole_model(model, make, self.rank == 0)

    def saver(self, folder: Path, model: nn.Module, tokenizer: Tokenizer, keep: Keep, tell: Callable[[str], None]):
        return ShardedSaver(folder, model, tokenizer, keep, tell, self.quiet)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold; a block may have lists of its own."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


class FullySharded(Sharded):
    """FSDP2: parameters, gradients and optimiser state in equal parts; a block's weights are gathered as it runs."""

    def __init__(self, training: TrainingConfig, device_type: str):
        super().__init__(training, device_type)
        self._mesh = init_device_mesh(device_type, (self.size,))

    def describe(self) -> str:
        return f", {self.size} ranks (FSDP2)"

    def _shard(self, model: nn.Module, dtype: str) -> None:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype != "float32":
            policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
        for block in _blocks(model):
            fully_shard(block, mesh=self._mesh, mp_policy=policy)
        self._module = fully_shard(WeightedLoss(model), mesh=self._mesh, mp_policy=policy)

    def build(self, make: Callable[[], nn.Module], device: torch.device, dtype: str) -> nn.Module:
        model, draw = on_meta(make)
        self._shard(model, dtype)
        draw(device)
        return model

    def load(self, checkpoint: Path, make: Callable[[], nn.Module], device: torch.device, dtype: str):
        model, draw = on_meta(make)
        self._shard(model, dtype)
        draw(device, random=False)
        return model, read_sharded(checkpoint, model, self.quiet)

    @contextlib.contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        self._module.set_requires_gradient_sync(last)
        self._module.set_is_last_backward(last)
        with warnings.catch_warnings():
            # A block hands its residual stream on, which FSDP2's own hook has made a view; nothing is added in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield

    def clip(self, model: nn.Module, largest: float) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        # An evaluation calls the model's own methods, so the root's hooks do not run.
        self._module.unshard()
        yield
        self._module.reshard()


class VocabParallel(Sharded):
    """Embedding and head split by vocabulary over ``tensor_parallel`` ranks; groups of them see different rows.

    The other parameters are whole on every rank; gradients are added up over the groups when the last part is done.
    """

    def __init__(self, training: TrainingConfig, device_type: str):
        super().__init__(training, device_type)
        within = training.tensor_parallel
        mesh: DeviceMesh = init_device_mesh(
            device_type, (self.size // within, within), mesh_dim_names=("data", "vocabulary")
        )
        self._vocabulary = mesh["vocabulary"]
        self._data_group = mesh["data"].get_group()
        self.parts, self.part = mesh["data"].size(), mesh["data"].get_local_rank()
        self.averaged = 1

    def describe(self) -> str:
        return f", {self.size} ranks (vocabulary over {self._vocabulary.size()})"

    def build(self, make: Callable[[], nn.Module], device: torch.device, dtype: str) -> nn.Module:
        return split_vocabulary(make().to(device), self._vocabulary)

    def load(self, checkpoint: Path, make: Callable[[], nn.Module], device: torch.device, dtype: str):
        model = self.build(make, device, dtype)
        return model, read_sharded(checkpoint, model, self.quiet)

    def clip(self, model: nn.Module, largest: float) -> torch.Tensor:
        whole = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        split = [p.grad.to_local() for p in model.parameters() if isinstance(p.grad, DTensor)]
        if self.parts > 1:
            for grads in (whole, split):
                flat = torch.cat([grad.flatten() for grad in grads])
                dist.all_reduce(flat, group=self._data_group)
                for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                    grad.copy_(total.view_as(grad))
        squares = torch.stack([grad.float().square().sum() for grad in split]).sum()
        dist.all_reduce(squares, group=self._vocabulary.get_group())
        norm = (squares + torch.stack([grad.float().square().sum() for grad in whole]).sum()).sqrt()
        # As torch.nn.utils.clip_grad_norm_ does.
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for grad in (*whole, *split):
            grad.mul_(factor.to(grad.dtype))
        return norm
