"""Muon for the hidden matrices, fused AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainingConfig


class GatheredMuon(torch.optim.Muon):
    """torch.optim.Muon for matrices that are spread over ranks (DTensors).

    The orthogonal factor of a matrix needs all of it: each update is gathered, and every rank computes the factor as a
    single process would, then keeps its part. (On DTensors themselves torch's would add up parts of bf16 products.)
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                whole = nn.Parameter(torch.zeros(p.shape, device=update.device, dtype=update.dtype))
                whole.grad = update.full_tensor()
                kept = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
                torch.optim.Muon([whole], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
                # Imported where there are such tensors: torch has loaded it by then.
                from torch.distributed.tensor import distribute_tensor

                part = distribute_tensor(whole.data, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=group["lr"])


# What each optimiser keeps of a parameter.
_QUANTITIES = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
    GatheredMuon: {"momentum_buffer"},
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
            spread = any(hasattr(p, "placements") for _, p in groups["hidden"])  # DTensors
            self._optimizers.append(
                (GatheredMuon if spread else torch.optim.Muon)(
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
