"""Low-rank adapters (Hu et al. 2022, LoRA): what a fine-tuning adds to the linear layers of blocks that stay frozen.

The layers are peft's. A checkpoint holds the adapters and the heads that are trained with them, and beside them the
merged weights, which every command reads.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import InputError
from ..files import read_tensors, save_tensors
from .objective import TrainedModel

ADAPTER = "adapter.safetensors"
# The adapters' product is multiplied with alpha / rank.
ALPHA_PER_RANK = 2


class Adapted(nn.Module):
    """What :func:`add_lora` did to a model, whose child ``adapted`` it becomes. It has no parameters and no buffers.

    ``trained``: the names of the trained parameters. ``frozen``: the hash of the others. Both stay with a copy of the
    model in which nothing is trained any more.
    """

    def __init__(self, trained: list[str], frozen: torch.Tensor):
        super().__init__()
        self.trained, self.frozen = trained, frozen


def add_lora(model: TrainedModel, rank: int, trained: Collection[str] = ()) -> nn.Module:
    """``model`` with adapters of ``rank`` on every linear layer of its blocks, in place.

    The adapters, which change nothing at first, and the parameters named in ``trained`` are trainable.
    """
    import peft

    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name.split(".")]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_module("adapted", Adapted(names, _frozen_sha256(model)))
    return model


def _layers(model: TrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def has_lora(model: TrainedModel) -> bool:
    """Whether :func:`add_lora` has been here."""
    return bool(_layers(model))


def merged(model: TrainedModel) -> TrainedModel:
    """A copy of ``model`` with its adapters multiplied out and added to the layers: of the shape that it had before."""
    model = copy.deepcopy(model)
    for name, layer in _layers(model).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    return model


def _frozen_sha256(model: TrainedModel) -> torch.Tensor:
    """The SHA-256 of the frozen parameters, 32 bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def save_adapter(model: TrainedModel, path: Path) -> None:
    """Write all that is trained of ``model``, and on which frozen weights.

    Raises:
        OSError: it cannot be written.
    """
    own = dict(model.named_parameters())
    save_tensors({name: own[name].detach() for name in model.adapted.trained} | {"frozen": model.adapted.frozen}, path)


@torch.no_grad()
def load_adapter(model: TrainedModel, path: Path) -> None:
    """Read what :func:`save_adapter` wrote into ``model``, which has adapters.

    Raises:
        InputError: it was trained on other frozen weights, or does not fit.
    """
    tensors = read_tensors(path)
    frozen = tensors.pop("frozen", None)
    own = dict(model.named_parameters())
    if sorted(tensors) != sorted(model.adapted.trained) or any(own[n].shape != t.shape for n, t in tensors.items()):
        raise InputError(f"{path}: adapters of another model or rank")
    if frozen is None or not torch.equal(frozen, model.adapted.frozen):
        raise InputError(f"{path}: trained on other weights than those that pretrained names now")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
