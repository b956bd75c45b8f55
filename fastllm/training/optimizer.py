"""Muon for the hidden matrices, fused AdamW for everything else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..models.blocks import MLP, Attention, CrossAttention
from ..models.head import Head
from .config import TrainingConfig
from .objective import TrainedModel
from .orthogonal import orthogonal

# What is added to the root of AdamW's second moment.
_ADAMW_EPS = 1e-8
# Neurons of an MLP in a block of Muon's: 64 scored as well as 32 and better than 256 and all (docs/recipe.md).
_NEURONS = 64


class _Optimizer(ABC):
    """An update rule over groups of parameters, and what it keeps of each.

    Not a ``torch.optim.Optimizer``: making one imports torch._dynamo and sympy, which is a second before a first step.

    Args:
        groups: each with ``params``, ``lr`` and ``weight_decay``.
    """

    # What is kept of a parameter that has been stepped.
    quantities: frozenset[str]

    def __init__(self, groups: Sequence[dict]):
        self.groups = [{**group, "peak_lr": group["lr"]} for group in groups]
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            for p in stepped:
                if p not in self.state:
                    self.state[p] = self._fresh(p)
            if stepped:
                self._update(group, stepped)

    @abstractmethod
    def _fresh(self, p: nn.Parameter) -> dict[str, torch.Tensor]:
        """What is kept of ``p`` before its first step, by the names in ``quantities``."""

    @abstractmethod
    def _update(self, group: dict, parameters: list[nn.Parameter]) -> None:
        """One step of those ``parameters`` of ``group`` that have gradients, and of what is kept of them."""


class AdamW(_Optimizer):
    """``torch.optim.AdamW`` with ``fused=True``, bit for bit, where a parameter and its gradient lie alike in memory.

    Others take PyTorch's steps of ``foreach=False``: on a CPU its fused kernel mistakes their elements for each other.

    PyTorch's fused kernel is one pass at the speed of memory also on a CPU: 5.8 ms for 10.65 million parameters,
    51 GB/s, on one core of an AMD EPYC held to AVX2.
    """

    quantities = frozenset({"step", "exp_avg", "exp_avg_sq"})

    def __init__(self, groups: Sequence[dict], betas: tuple[float, float]):
        super().__init__(groups)
        self._betas = betas

    def _fresh(self, p):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _is_in_one_order(self, p: Any) -> bool:
        """Whether the kernel, which goes through memory, meets the same elements of all that it reads of ``p``."""
        others = p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
        if p.is_contiguous() and all(t.is_contiguous() for t in others):
            return True
        return all(t.stride() == p.stride() for t in others)

    def _update(self, group, parameters: list[Any]):
        # The kernel takes either tensors or DTensors. A split vocabulary's group may hold both.
        by_kind: dict[tuple[type, bool], list[Any]] = {}
        for p in parameters:
            by_kind.setdefault((type(p.data), self._is_in_one_order(p)), []).append(p)
        for (_, fused), alike in by_kind.items():
            kept = [self.state[p] for p in alike]
            averages, squares, steps = ([one[key] for one in kept] for key in ("exp_avg", "exp_avg_sq", "step"))
            adamw(
                alike, [p.grad for p in alike], averages, squares, [], steps,
                fused=fused, foreach=False, amsgrad=False, maximize=False, eps=_ADAMW_EPS,
                lr=group["lr"], weight_decay=group["weight_decay"], beta1=self._betas[0], beta2=self._betas[1],
            )  # fmt: skip


class Blocks(NamedTuple):
    """How a weight (out, in) is cut: into ``size`` rows each, or ``size`` columns with ``columns``."""

    size: int
    columns: bool = False


def blocks_of(model: TrainedModel) -> dict[int, Blocks]:
    """id of a weight that is cut -> its blocks: of attention each head, of an MLP so many of its neurons."""
    found = {}
    for module in model.modules():
        if isinstance(module, MLP):
            size, inputs, output = _NEURONS, [module.up], module.down
        elif isinstance(module, Attention):
            size, inputs, output = module.config.head_dim, [module.qkv], module.out
        elif isinstance(module, CrossAttention):
            size, inputs, output = module.config.head_dim, [module.query, module.key_value], module.out
        else:
            continue
        found |= {id(layer.weight): Blocks(size) for layer in inputs}
        found[id(output.weight)] = Blocks(size, columns=True)
    return found


def _factor(update: torch.Tensor, blocks: Blocks | None) -> tuple[torch.Tensor, float]:
    """The orthogonal factors of the blocks of ``update`` (out, in), in their places, and what to multiply them with.

    Then the rows have a mean square norm of 1, cut or not. For a whole matrix it is torch's sqrt(max(1, out / in)).
    """
    if blocks is None:
        return orthogonal(update), math.sqrt(len(update) / min(update.shape))
    along = update.T if blocks.columns else update
    even = len(along) // blocks.size * blocks.size
    # What is left over is a smaller block.
    parts = [along[:even].unflatten(0, (-1, blocks.size)), along[None, even:]]
    factors = [orthogonal(part).flatten(0, 1) for part in parts if part.numel()]
    rank = sum(len(part) * min(part.shape[1:]) for part in parts)
    factor = torch.cat(factors)
    return factor.T if blocks.columns else factor, math.sqrt(len(update) / rank)


class Muon(_Optimizer):
    """``torch.optim.Muon`` with Nesterov momentum; matrices may be spread over ranks (DTensors).

    Bit for bit, but on a CPU without products of bfloat16, where :func:`orthogonal` is in float32, and for a weight of
    attention or of an MLP, whose blocks (:func:`blocks_of`) get an orthogonal factor each.

    Momentum, decay and the step are PyTorch's operators. For 10.6 million parameters they take 14.6 ms, and the
    orthogonal factors 0.12 s, on one core of an AMD EPYC held to AVX2.

    The orthogonal factor of a matrix needs all of it: an update that is spread is gathered, and every rank computes the
    factor as a single process would, then keeps its part. (On DTensors themselves torch's would add up parts of bf16
    products.)
    """

    quantities = frozenset({"momentum_buffer"})

    def __init__(self, groups: Sequence[dict], momentum: float, blocks: Mapping[int, Blocks]):
        super().__init__(groups)
        self._momentum, self._blocks = momentum, blocks

    def _fresh(self, p: Any):
        return {"momentum_buffer": torch.zeros_like(p.grad)}

    def _update(self, group, parameters: list[Any]):
        for p in parameters:
            buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - self._momentum)
            update = p.grad.lerp(buffer, self._momentum)
            spread = hasattr(p, "placements")
            whole = update.full_tensor() if spread else update
            update, scale = _factor(whole, self._blocks.get(id(p)))
            if spread:
                # Imported where there are such tensors: torch has loaded it by then.
                from torch.distributed.tensor import distribute_tensor

                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)


def parameter_groups(model: TrainedModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters by what they are: ``hidden`` matrices, ``embedding`` tables (a head too), ``vector``s.

    Muon's orthogonal update suits neither the tables nor a head (Jordan et al. 2024). Vectors (norms, biases) are never
    decayed.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, Head))}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"hidden": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "embedding" if id(parameter) in tables else "hidden" if parameter.ndim == 2 else "vector"
            groups[kind].append((name, parameter))
    return groups


class Optimizers:
    """The optimisers of a run, stepped together; ``state_dict`` is flat, of tensors and numbers by parameter name."""

    def __init__(self, model: TrainedModel, config: TrainingConfig):
        groups = parameter_groups(model)
        decay = {"hidden": config.hidden_decay, "embedding": config.embedding_weight_decay, "vector": 0.0}
        by_muon = ["hidden"] if config.optimizer == "muon" else []
        by_adamw = [kind for kind in groups if kind not in by_muon]

        def described(kinds: list[str], lr: float) -> list[dict]:
            return [{"params": [p for _, p in groups[kind]], "lr": lr, "weight_decay": decay[kind]} for kind in kinds]

        self._optimizers = [
            AdamW(described(by_adamw, config.lr), (config.beta1, config.beta2)),
            Muon(described(by_muon, config.muon_lr), config.momentum, blocks_of(model)),
        ]
        self._names = {id(p): name for group in groups.values() for name, p in group}

    def set_scale(self, scale: float) -> None:
        """Multiply the peak learning rates with ``scale``."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * scale

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for group in self._groups():
            for parameter in group["params"]:
                parameter.grad = None

    def _groups(self) -> Iterable[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.groups

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
        by_name = {self._names[id(p)]: (o, p) for o in self._optimizers for g in o.groups for p in g["params"]}
        found: dict[str, set[str]] = {}
        for key, value in tensors.items():
            name, _, quantity = key.rpartition(":")
            if name not in by_name:
                raise ValueError(f"optimizer state of an unknown parameter: {name}")
            optimizer, parameter = by_name[name]
            shape = () if quantity == "step" else tuple(parameter.shape)
            if quantity not in optimizer.quantities:
                kept = " and ".join(sorted(optimizer.quantities))
                raise ValueError(f"optimizer state {key}: {type(optimizer).__name__}, which trains it, keeps {kept}")
            if tuple(value.shape) != shape or value.is_complex():
                raise ValueError(f"optimizer state {key}: {tuple(value.shape)} does not fit the parameter {shape}")
            found.setdefault(name, set()).add(quantity)
            # The step count of AdamW is a scalar that lives beside the parameter.
            optimizer.state.setdefault(parameter, {})[quantity] = value.to(parameter.device)
        for name, quantities in found.items():
            missing = by_name[name][0].quantities - quantities
            if missing:
                raise ValueError(f"optimizer state of {name}: {min(missing)} is missing")
