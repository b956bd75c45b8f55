"""The types of fastllm.losses, as editors show them. Each signature is the function's own (tests/test_types.py)."""

from typing import Literal, TypeAlias, overload

from torch import Tensor

__all__ = [
    "cpo",
    "dapo",
    "dpo",
    "dr_grpo",
    "group_advantages",
    "grpo",
    "gspo",
    "kl_estimate",
    "kto",
    "orpo",
    "ppo",
    "reward_model",
    "sequence_log_probs",
    "simpo",
    "unpack",
]

_Kind: TypeAlias = Literal["sigmoid", "hinge", "ipo"]
_Estimator: TypeAlias = Literal["k1", "k2", "k3"]
_Clip: TypeAlias = float | tuple[float, float]
_Metrics: TypeAlias = dict[str, Tensor]

@overload
def cpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: _Kind = "sigmoid",
    nll: Tensor | None = None,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def cpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: _Kind = "sigmoid",
    nll: Tensor | None = None,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def dapo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = (0.2, 0.28),
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def dapo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = (0.2, 0.28),
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: _Kind = "sigmoid",
    label_smoothing: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: _Kind = "sigmoid",
    label_smoothing: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def dr_grpo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    max_length: int | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def dr_grpo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    max_length: int | None = None,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
def group_advantages(rewards: Tensor, group_size: int, *, normalize: bool = True, eps: float = 0.0001) -> Tensor: ...
@overload
def grpo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def grpo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def gspo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = (0.0003, 0.0004),
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def gspo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = (0.0003, 0.0004),
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: _Estimator = "k3") -> Tensor: ...
@overload
def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    nll: Tensor | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    nll: Tensor | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def ppo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def ppo(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: _Clip = 0.2,
    reference_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: _Estimator = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
@overload
def reward_model(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    center: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def reward_model(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    center: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
def sequence_log_probs(log_probs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor: ...
@overload
def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    return_metrics: Literal[True],
) -> tuple[Tensor, _Metrics]: ...
def unpack(values: Tensor, cu_seqlens: Tensor, *, max_seqlen: int | None = None) -> Tensor: ...
