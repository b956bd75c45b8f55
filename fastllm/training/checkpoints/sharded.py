"""Checkpoints of tensors that are spread over ranks, by torch.distributed.checkpoint in safetensors files.

Each rank writes its own parts, ``sharded/shard-0000R-model-00001-of-00001.safetensors``, whose header says where in
the whole tensors they belong; no pickle. They are read back at any number of ranks, whole or in parts, and so are the
two files of a checkpoint that is not sharded.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...config import InputError
from ...data import Tokenizer
from .checkpoint import SHARDED, Keep, State, save_checkpoint
from .saving import NotFinite, Saver


class ShardedSaver(Saver):
    """As :class:`~.saving.Saver`, for ranks that each hold a part: all of them call every method.

    Args:
        group: a gloo group that nothing else uses.
    """

    def __init__(
        self, folder: Path, model: nn.Module, tokenizer: Tokenizer, keep: Keep, tell: Callable[[str], None],
        group: dist.ProcessGroup,
    ):  # fmt: skip
        super().__init__(folder, model, tokenizer, keep, tell)
        self._group = group
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._main = dist.get_rank() == 0

    def save(self, state: State, tensors: Mapping[str, torch.Tensor]) -> None:
        self.wait(final=False)
        parts = {name: self._host(tensor) for name, tensor in (*self._live.named_parameters(), *tensors.items())}
        self.saving = state.step
        self._start(self._write_parts, state.copy(), parts)

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; of a part, one that still says where it belongs."""
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        mesh = tensor.device_mesh
        if mesh.device_type != "cpu" and mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return DTensor.from_local(
            tensor.to_local().detach().to("cpu", copy=True), self._meshes.get(mesh, mesh), tensor.placements,
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip

    def _write_parts(self, state: State, parts: dict[str, torch.Tensor]) -> None:
        problem = next(
            (
                name
                for name, tensor in parts.items()
                if tensor.is_floating_point()
                and not (tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all()
            ),
            None,
        )
        try:
            if self._any(problem is not None):
                raise NotFinite(f"{problem or 'another rank has a tensor that'} is not finite: this state is not saved")
            if self._main:
                save_checkpoint(self._folder, state, lambda folder: self._fill_parts(folder, parts), self._keep)
            else:
                self._fill_parts(None, parts)
            failed = self._any(False)
        except BaseException as error:  # raised again where it is waited for
            self._error = error
            if not isinstance(error, NotFinite):
                self._any(True)
            return
        if failed:
            self._error = OSError("another rank could not write its part of the checkpoint")
        else:
            self.saved = state.step

    def _any(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags.item())

    def _fill_parts(self, folder: Path | None, parts: dict[str, torch.Tensor]) -> None:
        if folder is not None:
            (folder / SHARDED).mkdir()
            config = {"architecture": type(self._live).__name__, **dataclasses.asdict(self._live.config)}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            self._tokenizer.save(folder / "tokenizer.json")
        name: list[Any] = [None if folder is None else str(folder / SHARDED)]
        dist.broadcast_object_list(name, src=0, group=self._group)
        dcp.save(  # pyright: ignore[reportPrivateImportUsage]  # documented there
            parts, storage_writer=HuggingFaceStorageWriter(name[0], save_distributed=True), process_group=self._group
        )


def _folder(checkpoint: Path) -> Path:
    return checkpoint / SHARDED if (checkpoint / SHARDED).exists() else checkpoint


def read_sharded(checkpoint: Path, model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
    """Fill the parameters of ``model``, whole or in parts, from a checkpoint; returns the optimisers' tensors alike.

    Args:
        group: the ranks that read together; None: this process reads alone.

    Raises:
        InputError: the files do not have the model's tensors, in its shapes.
    """
    folder = _folder(checkpoint)
    parameters = dict(model.named_parameters())
    stored: list[str] = []
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                stored += opened.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: damaged: {error}") from error
    wanted: dict[str, torch.Tensor] = {name: parameter.data for name, parameter in parameters.items()}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise InputError(f"{folder}: damaged: {missing[0]} is missing")
    tensors: dict[str, torch.Tensor] = {}
    for name in stored:
        parameter, _, quantity = name.rpartition(":")
        if not parameter:
            continue
        if parameter not in parameters:
            raise InputError(f"{folder}: optimizer state of an unknown parameter: {parameter}")
        tensors[name] = torch.zeros(()) if quantity == "step" else torch.zeros_like(parameters[parameter].data)
    try:
        with warnings.catch_warnings():
            # Said where one process reads alone, as is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(  # pyright: ignore[reportPrivateImportUsage]  # documented there
                {**wanted, **tensors}, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group,
                no_dist=group is None,
            )  # fmt: skip
    except (
        dcp.CheckpointException,  # pyright: ignore[reportPrivateImportUsage]  # documented there
        ValueError, AssertionError, RuntimeError,
    ) as error:  # fmt: skip
        raise InputError(f"{folder}: does not fit the model: {' '.join(str(error).split())[:300]}") from error
    return tensors


def load_whole(
    checkpoint: Path, make: Callable[[], nn.Module], device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model that is not spread over ranks, and the optimisers' tensors, from a checkpoint of one that was."""
    model = make().to(device)
    return model, read_sharded(checkpoint, model)


@torch.no_grad()
def whole_model(model: nn.Module, make: Callable[[], nn.Module], keep: bool) -> nn.Module | None:
    """A model in host memory with all of the weights that ``model`` has in parts; None where not to ``keep``.

    Every rank has to call it.
    """
    whole = make() if keep else None
    targets = {} if whole is None else dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            targets[name].copy_(value)
    return whole
