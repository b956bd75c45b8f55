"""The types of fastllm.functional, as editors show them. Each signature is the function's own (tests/test_types.py)."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

from torch import Tensor

from .ops.cross_entropy.chunks import LinearCrossEntropyPlan

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "embedding_sum",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_plan",
    "linear_kl_div",
    "linear_log_probs",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "swiglu",
]

_Shape: TypeAlias = int | Sequence[int]
_Reduction: TypeAlias = Literal["mean", "sum", "none"]

def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: _Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]: ...
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: _Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: _Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_lse: Literal[False] = False,
    inplace: bool = False,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: _Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_lse: Literal[True],
    inplace: bool = False,
) -> tuple[Tensor, Tensor]: ...
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    main_grad: Tensor | None = None,
    vocab_range: tuple[int, int] | None = None,
) -> Tensor: ...
def embedding_sum(
    indices: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    *,
    padding_idx: int | Sequence[int | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
) -> Tensor: ...
def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: Literal["none", "tanh"] = "none") -> Tensor: ...
def layer_norm(
    input: Tensor,
    normalized_shape: _Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> Tensor: ...
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: _Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    shift: int = 0,
    max_workspace_mb: float | None = None,
    max_targets: int | None = None,
    recompute: bool = False,
    return_lse: Literal[False] = False,
    return_accuracy: Literal[False] = False,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: _Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    shift: int = 0,
    max_workspace_mb: float | None = None,
    max_targets: int | None = None,
    recompute: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_entropy: bool = False,
) -> tuple[Tensor, ...]: ...
def linear_cross_entropy_plan(
    input: Tensor,
    linear_weight: Tensor,
    *,
    reduction: _Reduction = "mean",
    softcap: float | None = None,
    max_workspace_mb: float | None = None,
    max_targets: int | None = None,
    recompute: bool = False,
    return_entropy: bool = False,
) -> LinearCrossEntropyPlan: ...
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    target: Tensor | None = None,
    direction: Literal["forward", "reverse", "jsd"] = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: _Reduction = "mean",
    max_workspace_mb: float | None = None,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor: ...
@overload
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: Literal[False] = False,
    token_weight: Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    max_workspace_mb: float | None = None,
) -> Tensor: ...
@overload
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: Literal[True],
    token_weight: Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    max_workspace_mb: float | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    input: Tensor,
    normalized_shape: _Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor: ...
@overload
def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def rotary_embedding(
    query: Tensor,
    key: None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, None]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor: ...
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor: ...
