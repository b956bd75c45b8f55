"""accelerate() and revert() for any torch.nn.Module, accelerated() for functional calls."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterable

import torch

from . import forwards, torch_switch  # noqa: F401  (forwards registers itself)
from .attention import INTERFACE, attention_decisions, give_back, switches_within, take_over
from .configuration import Switch
from .mode import accelerated
from .report import Entry, Estimate, Report
from .rules import OPS_SERVED, Decision, Rules
from .swap import restore_forward, swap_forward
from .trl import ServedTrainer, serve_trl

torch_switch.register_switch()

__all__ = ["Entry", "Estimate", "Report", "ServedTrainer", "accelerate", "accelerated", "revert", "serve_trl"]


class _Filter:
    """``only`` or ``skip``: ops by name, classes, module paths with wildcards."""

    def __init__(self, argument: str, value, model: torch.nn.Module):
        items = [value] if isinstance(value, str | type) else list(value)
        self.ops, self.classes, self.globs = set(), [], []
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        for item in items:
            if isinstance(item, type):
                self.classes.append(item)
            elif not isinstance(item, str):
                raise TypeError(
                    f"accelerate: {argument} takes op names, module paths (with * and ?) and classes, got {item!r}"
                )
            elif item in OPS_SERVED:
                self.ops.add(item)
            elif any(fnmatch.fnmatchcase(path, item) for path in paths):
                self.globs.append(item)
            else:
                raise ValueError(
                    f"accelerate: {argument}={item!r} is neither an op ({', '.join(OPS_SERVED)}) nor a module's path"
                )

    def matches(self, path: str, module: torch.nn.Module, op: str) -> bool:
        return (
            op in self.ops
            or isinstance(module, tuple(self.classes))
            or any(fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*") for glob in self.globs)
        )


def accelerate(
    model: torch.nn.Module,
    *,
    only: str | type | Iterable[str | type] | None = None,
    skip: str | type | Iterable[str | type] | None = None,
    verify: bool = True,
    dry_run: bool = False,
) -> Report:
    """Make ``model``'s own modules run on fastllm's ops, in place, and report what was done.

    torch.nn's norms, embeddings, cross-entropy and multi-head attention are found by their type. Other norms are
    found by what their forward computes, measured on random inputs
    (:func:`fastllm.drop_in.norms_probe.recognise_norm`). A vocabulary head is the model's output embeddings, or a
    layer with as many outputs as an embedding has rows. Attention is served through transformers'
    AttentionInterface, as "fastllm". Uncertain modules are left alone, with the reason.

    Only these instances change. Parameters, buffers, hooks, state_dict keys, dtype, device, tying and training mode
    stay. Pickling and copying keep the acceleration, and :func:`revert` undoes it. Call it before or after
    ``torch.compile``, DDP, ``fully_shard`` or an adapter, and before or after the weights are loaded. A call that a
    kernel does not serve (a DTensor, another dtype, vmap) takes the original forward.

    In training, the logits of a head are computed only when they are read, and ``F.cross_entropy`` does not read them.
    Reading them after the weights have changed raises. ``skip="linear_cross_entropy"`` keeps ordinary logits.

    Args:
        model: any module tree.
        only: consider only these: names of ops (``"rms_norm"``), module paths with wildcards, which stand for the
            modules and all below them (``"encoder.*"``), or classes; one or several.
        skip: leave these alone; the same forms.
        verify: recognise modules by measuring them. False leaves all of those alone, and is for large models whose
            classes are torch's own.
        dry_run: decide and report, but change nothing.

    Returns:
        A :class:`Report`: print it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``only`` or ``skip`` names something that does not exist.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = None if only is None else _Filter("only", only, model)
    unwanted = None if skip is None else _Filter("skip", skip, model)

    def filtered(path: str, module: torch.nn.Module, *ops: str) -> str | None:
        """Why none of ``ops`` may serve ``module``, or None; the first one is what it would be swapped for."""
        if unwanted is not None and unwanted.matches(path, module, ops[0]):
            return "skip names it"
        if wanted is not None and not any(wanted.matches(path, module, op) for op in ops):
            return "only does not name it"
        return None

    report = Report(model=weakref.ref(model))
    rules = Rules(model, verify, sums=lambda path, module: filtered(path, module, "embedding_sum") is None)
    decisions = [(path, module, rules.decide(path, module)) for path, module in model.named_modules()]
    switches = switches_within(model)
    for path, module, decision in [*decisions, *attention_decisions(model)]:
        if decision is None:
            continue
        ops = (decision.op, "embedding_sum") if decision.sums else (decision.op,)
        why = filtered(path, module, *ops) if decision.kind is not None else None
        if why is not None:
            decision = Decision(decision.op, None, why)
        if decision.kind is not None and not dry_run:
            decision = _carry_out(module, decision, switches)
        _note(path, module, decision, report)
    return report


def _carry_out(module, decision: Decision, switches: dict[int, Switch]) -> Decision:
    try:
        if decision.kind is INTERFACE:
            take_over(module, switches)
            return decision
        if decision.kind is not None:
            swap_forward(module, decision.kind)
    except (TypeError, ValueError) as error:
        return Decision(decision.op, None, f"Python refuses it another class: {error}")
    return decision


def _note(path: str, module, decision: Decision, report: Report) -> None:
    served = decision.kind is not None
    entry = Entry(path, type(module).__name__, decision.op if served else "", decision.why)
    (report.swapped if served else report.left).append(entry)
    if served and decision.size is not None:
        report.sizes.append(decision.size)


def revert(model: torch.nn.Module) -> int:
    """Undo what :func:`accelerate` did to ``model``; returns the number of modules that were changed.

    They have their original forwards again, so outputs are bit for bit what they were. A copy or an unpickled model can
    be reverted as well. A model that was never accelerated is left as it is.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    return give_back(model) + sum(restore_forward(module) for module in model.modules())
