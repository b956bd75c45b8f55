"""What to do with each module: swap it for something, or leave it and say why."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.linear import pays
from ..ops.shared.widened import widens
from .experts import Experts
from .experts_probe import looks_like_experts, recognise_experts
from .gated import GatedMLP
from .gated_probe import looks_like_gated, recognise_gated
from .norms import Norm
from .norms_probe import looks_like_norm, recognise_norm
from .probe import OWN, settings_of
from .report import Size
from .rows import ALWAYS, IN_TRAINING
from .swap import Accelerated, Kind, original_forward

# torch's class -> the op that serves it, with the same name as the forward's kind.
TORCH_MODULES = {
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.Embedding: "embedding",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MultiheadAttention: "multihead_attention",
}
WHOLE_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
OPS_SERVED = (
    *TORCH_MODULES.values(),
    "embedding_sum",
    "linear",
    "linear_cross_entropy",
    "attention",
    "swiglu",
    "geglu",
)

UNMEASURED = "a look-alike is swapped only once it is measured, and verify is False"


@dataclass(frozen=True)
class Decision:
    """``kind`` is None where the module is left; ``op`` is what serves or would have served it."""

    op: str
    kind: Kind | None
    why: str
    size: Size | None = None

    @property
    def sums(self) -> bool:
        """Whether it stands for embedding_sum, too."""
        return self.kind is not None and self.kind.name == "embedding" and bool(self.kind.options)


def obstacle(module: nn.Module) -> str | None:
    """Why this instance cannot get another forward, whatever it computes; or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: its forward is compiled already"
    if isinstance(module, torch.fx.GraphModule):
        return "its forward is a traced graph"
    if "forward" in vars(module):
        return "this instance's forward has been replaced already"
    if any(torch.nn.parameter.is_lazy(p) for p in module.parameters(recurse=False) if p is not None):
        return "its parameters do not exist yet; call accelerate after the first forward"
    return None


def odd_tensors(module: nn.Module) -> str | None:
    """Why its parameters are not what the kernels take; or None. DTensors are: they become plain within FSDP2."""
    for name, tensor in module.named_parameters(recurse=False):
        kind = type(tensor.data)
        if kind is not torch.Tensor and kind.__name__ not in ("DTensor", "FakeTensor"):
            return f"{name} is a {kind.__name__}"
        if not tensor.is_floating_point():
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _size(module, op: str, path: str) -> Size | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    return Size(op, tuple(weight.shape), weight.dtype, path)


class Rules:
    """Decides for one model; look-alikes with the same attributes are measured once."""

    def __init__(self, model: nn.Module, verify: bool, sums: Callable[[str, nn.Module], bool]):
        self.verify = verify
        self.sums = sums  # whether sums of this embedding may be one op
        self.measured: dict[tuple, Norm | GatedMLP | Experts | str] = {}
        self.heads = dict(find_heads(model))
        self.summed = set(find_summed(model))
        # torch's fused inference of encoder layers takes no tensor that is still to be computed.
        self.sums_when = (
            IN_TRAINING if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()) else ALWAYS
        )

    def decide(self, path: str, module: nn.Module) -> Decision | None:
        """What becomes of ``module``, or None if it is nothing that we serve."""
        if isinstance(module, Accelerated):
            kind: Kind = module.fastllm_kind
            names_itself = kind.name in ("norm", "gated_mlp", "experts")
            op = kind.options.op if names_itself else _OP_OF.get(kind.name, kind.name)
            return Decision(op, None, "it is accelerated already")
        if type(module).__module__.startswith("fastllm."):
            return None
        for cls, op in TORCH_MODULES.items():
            if isinstance(module, cls):
                return self._torch_module(path, module, cls, op)
        if isinstance(module, WHOLE_LAYERS):
            return Decision(
                "attention", None,
                "its attention and norms are swapped; in evaluation without gradients torch's fused layer serves it",
            )  # fmt: skip
        if id(module) in self.heads:
            return self._head(path, module)
        products = _products_of(module)
        if products is not None:
            return products
        if type(module).__module__.startswith("torch."):
            return None
        if looks_like_norm(module):
            return self._norm(path, module)
        if looks_like_gated(module):
            return self._product(
                module, obstacle(module), "gated_mlp", recognise_gated, "mlp|ffn|feed_?forward|glu|gated"
            )
        if looks_like_experts(module):
            why = obstacle(module) or odd_tensors(module)
            return self._product(module, why, "experts", recognise_experts, "expert|moe|mixture")
        return None

    def _torch_module(self, path: str, module, cls: type, op: str) -> Decision:
        why = obstacle(module) or odd_tensors(module)
        if why is not None:
            return Decision(op, None, why)
        if original_forward(module) is not cls.forward:
            if cls in (nn.LayerNorm, nn.RMSNorm):
                return self._norm(path, module)
            return Decision(op, None, f"its class has a forward of its own, not {cls.__name__}'s")
        if op == "multihead_attention" and not all(
            isinstance(module.out_proj, nn.Linear) and type(p.data) is torch.Tensor for p in module.parameters()
        ):
            return Decision(op, None, "its output projection is no plain linear layer")
        options = None
        why = f"torch.nn.{cls.__name__}"
        if op == "embedding":
            options = self.sums_when if id(module) in self.summed and self.sums(path, module) else None
            if options:
                why = "torch.nn.Embedding; sums with its neighbours become one embedding_sum"
        return Decision(op, Kind(op, options), why, _size(module, op, path))

    def _norm(self, path: str, module) -> Decision:
        why = obstacle(module) or odd_tensors(module)
        if why is not None:
            return Decision("rms_norm", None, why)
        if not self.verify:
            return Decision("rms_norm", None, UNMEASURED)
        norm = self._measure(module, recognise_norm)
        if isinstance(norm, str):
            return Decision("rms_norm", None, norm)
        return Decision(norm.op, Kind("norm", norm), f"measured: {norm}", _size(module, norm.op, path))

    def _product(self, module, why: str | None, kind: str, recognise: Callable, names: str) -> Decision | None:
        """A product with a gate that ``recognise`` finds, unless there is a reason ``why`` not to look for one.

        Other modules have weights of such shapes, attention for instance: what is not recognised is worth a line only
        where its class's name matches ``names``.
        """
        if why is not None or not self.verify:
            return Decision("swiglu", None, why or UNMEASURED)
        found = self._measure(module, recognise)
        if isinstance(found, str):
            named = re.search(names, type(module).__name__, re.IGNORECASE)
            return Decision("swiglu", None, found) if named else None
        return Decision(found.op, Kind(kind, found), f"measured: {found}")

    def _measure(self, module, recognise: Callable):
        key = _fingerprint(module)
        if key not in self.measured:
            self.measured[key] = recognise(module)
        return self.measured[key]

    def _head(self, path: str, module) -> Decision:
        op = "linear_cross_entropy"
        why = obstacle(module) or odd_tensors(module)
        if why is None and original_forward(module) is not nn.Linear.forward:
            why = f"the head is a {type(module).__name__} with a forward of its own, not torch.nn.Linear's"
        if why is not None:
            return Decision(op, None, why)
        return Decision(
            op, Kind(op), f"{self.heads[id(module)]}; in training its logits are computed when somebody reads them",
            _size(module, op, path),
        )  # fmt: skip


# A kind -> the op that serves it, where its name is another.
_OP_OF = {"conv1d": "linear"}


def _products_of(module) -> Decision | None:
    """For a linear layer whose products are faster by functional.linear on this CPU; None for everything else."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(pytorch_utils, "Conv1D", nn.Linear)
    cls = next((cls for cls in (nn.Linear, conv1d) if isinstance(module, cls)), None)
    weight = None if cls is None else module._parameters.get("weight")
    if cls is None or not isinstance(weight, torch.Tensor):
        return None
    faster = pays(weight)
    if faster is None:
        return None
    dtype = str(weight.dtype).removeprefix("torch.")
    why = obstacle(module) or odd_tensors(module)
    if why is None and original_forward(module) is not cls.forward:
        why = f"{faster}, and its class has a forward of its own, not {cls.__name__}'s"
    if why is not None:
        # In float32 PyTorch's own product is slower, not out of use: nobody asks why a layer keeps it.
        return Decision("linear", None, why) if widens(weight) else None
    kind = Kind("linear" if cls is nn.Linear else "conv1d")
    return Decision("linear", kind, f"{cls.__name__} in {dtype}: {faster}")


def _fingerprint(module: nn.Module) -> tuple:
    """Equal for modules whose forwards do the same: class, attributes, parameters' shapes, and so on for the parts."""
    settings = settings_of(module)
    known = OWN.union(name for name, _ in settings)
    others = tuple((name, id(value)) for name, value in sorted(vars(module).items()) if name not in known)
    parameters = tuple((n, tuple(p.shape), p.dtype, str(p.device)) for n, p in module.named_parameters(recurse=False))
    parts = tuple((name, _fingerprint(part)) for name, part in module.named_children())
    return type(module), settings, others, parameters, parts


def _feeding_neighbours(model: nn.Module) -> set[int]:
    """ids of the linear layers beside one that takes as many features as they give: the first of an MLP."""
    found = set()
    for parent in model.modules():
        layers = [m for m in parent.children() if isinstance(m, nn.Linear)]
        taken = {layer.in_features for layer in layers}
        found |= {id(layer) for layer in layers if layer.out_features in taken}
    return found


def find_heads(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(id, why) of the layers that give logits over a vocabulary."""
    inside: set[int] = set()
    for module in model.modules():
        get: Callable | None = getattr(module, "get_output_embeddings", None)
        if get is None or not callable(get):
            continue
        inside.update(id(m) for m in module.modules())
        try:
            head = get()
        except Exception:  # foreign code: without an answer there is no head
            continue
        if isinstance(head, nn.Module) and any(head is m for m in module.modules()):
            yield id(head), "the model names it as its output embeddings"
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    inside |= _feeding_neighbours(model)
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.Linear):
            continue
        if module.out_features in vocabularies and module.out_features > module.in_features:
            yield id(module), "it gives one logit for each row of an embedding"


def find_summed(model: nn.Module) -> Iterator[int]:
    """ids of embeddings that have neighbours of the same width, which models add up."""
    for parent in model.modules():
        tables = [m for m in parent.children() if isinstance(m, nn.Embedding)]
        for table in tables:
            if sum(other.embedding_dim == table.embedding_dim for other in tables) > 1:
                yield id(table)
