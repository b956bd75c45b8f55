"""TRL's trainers on linear_log_probs: what their fused output layer computes, by this library's code."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch

from ..ops.cross_entropy.log_probs import log_prob_rows

# What of TRL's forward is served: it looks these two names up in its module (trl.trainer.utils of 1.16).
KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"


class HeadCall(NamedTuple):
    """The arguments of TRL's ``ChunkedLogProbFunction.apply``; rows with a target only."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    temperature: float
    chunk_size: int
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ServedHead:
    """In place of TRL's autograd function: the same outputs, by linear_log_probs.

    ``log_sum_sq_probs``, and ``mean_logits`` under a soft cap, are TRL's own: they take its products once more.
    """

    def __init__(self, theirs: Any):
        self.theirs = theirs

    def apply(self, *args):
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None where not asked for."""
        call = HeadCall(*args)
        scale, wanted = call.logit_scale, call.outputs
        x = call.hidden if scale == 1.0 else call.hidden * scale
        weight = call.weight.to(x.dtype)
        bias = None if call.bias is None else (call.bias * scale).to(x.dtype)
        log_probs, top, entropy = log_prob_rows(
            x, weight, call.targets, linear_bias=bias, temperature=call.temperature, softcap=call.softcap,
            return_entropy="entropy" in wanted, return_accuracy="is_top1" in wanted,
        )  # fmt: skip
        # TRL's own statistics of the rows, which get no gradient.
        others = {"log_sum_sq_probs", "mean_logits"} & set(wanted)
        mean = squares = None
        with torch.no_grad():
            if "mean_logits" in others and call.softcap is None:
                mean = (x @ weight.mean(0) + (0.0 if bias is None else bias.mean())).float() / call.temperature
                others.remove("mean_logits")
            if others:
                _, _, squares, found, _ = self.theirs.apply(*call._replace(outputs=tuple(others)))
                mean = found if mean is None else mean
        return log_probs, entropy, squares, mean, None if top is None else top.bool()


def _fused_forward(model: torch.nn.Module):
    """The forward that TRL has put on ``model``, None where it has put none."""
    forward = vars(model).get("forward")
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return forward if code is not None and {KERNEL, COMPACT} <= set(code.co_names) else None


def _with_names(forward, names: dict[str, Any]):
    """``forward``, a method, with other values for names of its module."""
    theirs = forward.__func__
    mine = types.FunctionType(
        theirs.__code__, {**theirs.__globals__, **names}, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )
    mine.__kwdefaults__ = theirs.__kwdefaults__
    # generate() validates its arguments by the signature that this leads to.
    mine.__wrapped__ = getattr(theirs, "__wrapped__", theirs)
    return types.MethodType(mine, forward.__self__)


class ServedTrainer:
    """What :func:`serve_trl` has changed, as a context manager that undoes it. ``models``: the models that are
    served."""

    def __init__(self, forwards: list[tuple[torch.nn.Module, Any, Any]]):
        self._forwards = forwards
        self.models = [model for model, _, _ in forwards]

    def revert(self) -> None:
        """Restore the forwards that TRL gave the models. A forward that has been wrapped since is left as it is."""
        for model, theirs, mine in self._forwards:
            if vars(model).get("forward") is mine:
                model.forward = theirs

    def __enter__(self) -> ServedTrainer:
        return self

    def __exit__(self, *_) -> None:
        self.revert()


def serve_trl(trainer) -> ServedTrainer:
    """Make ``trainer``, one of TRL's, compute log-probabilities and entropies by this library's linear_log_probs.

    TRL 1.16's DPO, GRPO, RLOO, KTO and SFT trainers put a fused output layer on their models. This changes the code of
    that layer on the models of this trainer only, ``trainer.model`` and ``trainer.ref_model``. Call it between making
    the trainer and ``train()``, before accelerate wraps the model::

        with fastllm.drop_in.serve_trl(trainer):
            trainer.train()

    Only positions with a label are computed, also on a CPU, where TRL computes all positions. In TRL's accuracy, a
    target that shares the largest logit counts as correct.

    Raises:
        TypeError: the trainer's model has no fused output layer of TRL's that this version knows.
    """
    found = []
    for name in ("model", "ref_model"):
        model = getattr(trainer, name, None)
        if model is None:
            continue
        # The model inside PEFT's wrapper.
        model = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
        forward = _fused_forward(model)
        if forward is not None:
            found.append((model, forward))
        elif name == "model":
            raise TypeError(
                f"serve_trl: expected a trainer of TRL's whose model has its fused output layer, as TRL 1.16 makes; "
                f"got a {type(trainer).__name__} with a {type(model).__name__} without one"
            )
    served = []
    for model, theirs in found:
        kernel = theirs.__func__.__globals__[KERNEL]
        if isinstance(kernel, ServedHead):
            continue
        mine = _with_names(theirs, {KERNEL: ServedHead(kernel), COMPACT: lambda device: True})
        model.forward = mine
        served.append((model, theirs, mine))
    return ServedTrainer(served)
