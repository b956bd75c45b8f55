"""Muon for the hidden matrices, fused AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainingConfig

# What each optimiser keeps of a parameter.
_QUANTITIES = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters by what they are: ``hidden`` matrices, ``embedding`` tables (a head too), ``vector``s.

    A head is what gives as many outputs as the vocabulary has tokens; Muon's orthogonal update suits neither it nor
    the tables (Jordan et al. 2024). Vectors (norms, biases) are never decayed.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.out_features == model.config.vocab_size and m.weight.ndim == 2
    }
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"hidden": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "embedding" if id(parameter) in tables else "hidden" if parameter.ndim == 2 else "vector"
            groups[kind].append((name, parameter))
    return groups


class Optimizers:
    """The optimisers of a run, stepped together; ``state_dict`` is flat, of tensors and numbers by parameter name."""

    def __init__(self, model: nn.Module, config: TrainingConfig):
        groups = parameter_groups(model)
        decay = {"hidden": config.weight_decay, "embedding": config.embedding_weight_decay, "vector": 0.0}
        adamw = [kind for kind in groups if groups[kind] and not (kind == "hidden" and config.optimizer == "muon")]
        self._optimizers: list[torch.optim.Optimizer] = []
        self._names = {id(p): name for group in groups.values() for name, p in group}
        if adamw:
            self._optimizers.append(
                torch.optim.AdamW(
                    [{"params": [p for _, p in groups[kind]], "weight_decay": decay[kind]} for kind in adamw],
                    lr=config.lr,
                    betas=(config.beta1, config.beta2),
                    fused=True,
                )
            )
        if config.optimizer == "muon" and groups["hidden"]:
            self._optimizers.append(
                torch.optim.Muon(
                    [p for _, p in groups["hidden"]],
                    lr=config.muon_lr,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                )
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def set_scale(self, scale: float) -> None:
        """Multiply the peak learning rates with ``scale``."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * scale

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _groups(self) -> Iterable[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``<parameter>:<quantity>`` -> tensor, for every parameter that has been stepped."""
        return {
            f"{self._names[id(parameter)]}:{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of :meth:`state_dict`.

        Raises:
            ValueError: ``tensors`` names a parameter that these optimisers do not have, or what one of them keeps of it
                is not all there, or not of its shape.
        """
        by_name = {self._names[id(p)]: (o, p) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        found: dict[str, set[str]] = {}
        for key, value in tensors.items():
            name, _, quantity = key.rpartition(":")
            if name not in by_name:
                raise ValueError(f"optimizer state of an unknown parameter: {name}")
            optimizer, parameter = by_name[name]
            shape = () if quantity == "step" else tuple(parameter.shape)
            if quantity not in _QUANTITIES[type(optimizer)] or tuple(value.shape) != shape or value.is_complex():
                raise ValueError(f"optimizer state {key}: {tuple(value.shape)} does not fit the parameter {shape}")
            found.setdefault(name, set()).add(quantity)
            # The step count of AdamW is a scalar that lives beside the parameter.
            optimizer.state[parameter][quantity] = value.to(parameter.device)
        for name, quantities in found.items():
            missing = _QUANTITIES[type(by_name[name][0])] - quantities
            if missing:
                raise ValueError(f"optimizer state of {name}: {min(missing)} is missing")
