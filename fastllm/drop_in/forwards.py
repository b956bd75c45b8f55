"""The forwards of torch's own modules, as :func:`fastllm.accelerate` replaces them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import free_for_native
from ..functional import cross_entropy, embedding, layer_norm, linear, rms_norm
from ..ops.attention.multihead import AttentionMasks, multihead_attention
from ..ops.linear import MIN_ROWS, max_step_rows, pays, takes_rows
from ..ops.linear_rows import linear_rows
from ..ops.shared.autograd import unwatched
from ..ops.shared.onednn import onednn_serves
from ..ops.shared.widened import NARROW, widens
from .calls import own
from .deferred import Deferred, value_of
from .fused import fused_inference
from .logits import Logits
from .plain import freed_after_forward, hooked, plain, recorded
from .rows import ALWAYS, IN_TRAINING, Rows
from .swap import forward_of, original_forward

UNFIT = "tensors, dtypes, shapes or devices that it does not take, or vmap, tracing or forward-mode differentiation"
FEW_ROWS = "so few rows do not pay, and the extension does not take the call"
ORDINARY_LOGITS = "logits are ordinary in evaluation, without gradients, with hooks, of tensors it does not take"


def _fits(module, x, *parameters) -> bool:
    shape = module.normalized_shape
    return (
        plain(x, *parameters)
        and x.is_floating_point()
        and tuple(x.shape[-len(shape) :]) == tuple(shape)
        and not (x.dtype in NARROW and torch.is_autocast_enabled(x.device.type))  # torch may widen it
        and all(p is None or (p.device == x.device and p.dtype == x.dtype) for p in parameters)
    )


@forward_of("layer_norm")
def layer_norm_forward(module, original, options, input):
    # Read once: a parametrization computes them anew each time.
    x, weight, bias = value_of(input), module.weight, module.bias
    if not _fits(module, x, weight, bias):
        own("layer_norm", UNFIT)
        return original(module, x)
    return layer_norm(x, module.normalized_shape, weight, bias, module.eps)


@forward_of("rms_norm")
def rms_norm_forward(module, original, options, x):
    x, weight = value_of(x), module.weight
    if not _fits(module, x, weight):
        own("rms_norm", UNFIT)
        return original(module, x)
    return rms_norm(x, module.normalized_shape, weight, module.eps)


@forward_of("embedding")
def embedding_forward(module, original, may_defer: str | None, input):
    weight = module.weight
    if not plain(input, weight) or input.dtype not in (torch.int64, torch.int32) or not weight.is_floating_point():
        own("embedding", UNFIT)
        return original(module, input)
    if input.device != weight.device:
        own("embedding", "ids and table are on two devices")
        return original(module, input)
    simple = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    when = may_defer == ALWAYS or (may_defer == IN_TRAINING and module.training)
    if when and simple and not recorded() and not weight.is_inference() and not hooked(module):
        return Rows.of(input, weight, module.padding_idx)
    return embedding(
        input, weight, module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse
    )


@forward_of("linear_cross_entropy")
def head_forward(module, original, options, input):
    x, weight, bias = value_of(input), module.weight, module.bias
    if (
        recorded()
        or not (module.training and torch.is_grad_enabled())
        or hooked(module)
        or not plain(x, weight, bias)
        or not x.is_floating_point()
        or x.dim() < 2
        or x.shape[-1] != weight.shape[1]
        or x.device != weight.device
        or not (x.requires_grad or weight.requires_grad)
        or not (x.dtype == weight.dtype or _cast_by_autocast(x, weight))
        or x.is_inference()
        or weight.is_inference()
        or freed_after_forward(module)
    ):
        if pays(weight):
            return linear_forward(module, original, options, x)
        own("linear_cross_entropy", ORDINARY_LOGITS)
        return original(module, x)
    return Logits.of(x, weight, bias)


def _cast_by_autocast(*tensors) -> bool:
    """Whether the tensors of a product get one dtype from autocast, which leaves fp64."""
    return torch.is_autocast_enabled(tensors[0].device.type) and all(t.dtype != torch.float64 for t in tensors)


def _multiplied(module, original, x, weight):
    """``linear(x, weight, bias)`` where the tensors are ordinary ones of one dtype, else the original forward."""
    bias = module.bias
    if torch._C._get_tracing_state() is not None or not isinstance(x, torch.Tensor):
        own("linear", UNFIT)
        return original(module, x)
    columns = x.shape[-1] if x.dim() > 0 else 0
    few = x.numel() <= max_step_rows(weight) * columns and takes_rows(x, weight, bias)
    many = x.numel() >= MIN_ROWS * columns if widens(weight) else onednn_serves(x, weight)
    if not (few or many):
        own("linear", FEW_ROWS)
        return original(module, x)
    ordinary = plain(x, weight, bias) and _alike(x, weight) and (bias is None or _alike(bias, weight))
    if not ordinary or x.dim() == 0 or columns != weight.shape[1]:
        own("linear", UNFIT)
        return original(module, x)
    if few and free_for_native(x) and unwatched(x, weight, bias) and not torch.is_autocast_enabled("cpu"):
        return linear_rows(x, weight, bias)  # what linear() comes to; without its choices, which take 6 us
    return linear(x, weight, bias)


def _alike(x, weight) -> bool:
    return x.dtype == weight.dtype and ((x.is_cpu and weight.is_cpu) or x.device == weight.device)


@forward_of("linear")
def linear_forward(module, original, options, input):
    return _multiplied(module, original, value_of(input), module.weight)


@forward_of("conv1d")
def conv1d_forward(module, original, options, x):
    """transformers' Conv1D, whose weight is (in_features, out_features)."""
    return _multiplied(module, original, value_of(x), module.weight.t())


@forward_of("cross_entropy")
def cross_entropy_forward(module, original, options, input, target):
    if isinstance(input, Deferred) or target is None or not plain(input, target, module.weight):
        own("cross_entropy", UNFIT)
        return original(module, input, target)
    if (
        not input.is_floating_point()
        or not (target.is_floating_point() or target.dtype in (torch.int64, torch.uint8))
        or target.device != input.device
    ):
        own("cross_entropy", UNFIT)
        return original(module, input, target)
    try:
        return cross_entropy(
            input, target, module.weight, ignore_index=module.ignore_index, reduction=module.reduction,
            label_smoothing=module.label_smoothing,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        own("cross_entropy", str(error))
        return original(module, input, target)  # which says so in torch's own words


def _is_linear(module) -> bool:
    """Whether torch, which reads its parameters and never calls it, would see the same layer."""
    return original_forward(module) is torch.nn.Linear.forward and not hooked(module) and "forward" not in vars(module)


class _Asked(NamedTuple):
    """What the forward of ``torch.nn.MultiheadAttention`` is called with."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None = None
    need_weights: bool = True
    attn_mask: torch.Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


@forward_of("multihead_attention")
def multihead_attention_forward(module, original, options, *args, **kwargs):
    asked = _Asked(*args, **kwargs)
    same = asked.query is asked.key and asked.key is asked.value
    query, key, value = (value_of(x) for x in asked[:3])
    if same:
        key = value = query
    asked = asked._replace(query=query, key=key, value=value)
    weights = [p for p in module.parameters() if p is not None]
    ordinary = not asked.need_weights and all(map(plain, (query, key, value)))
    ordinary = ordinary and plain(query, asked.key_padding_mask, asked.attn_mask, *weights)
    ordinary = ordinary and query.is_floating_point() and _is_linear(module.out_proj)

    def before():
        return fused_inference(original, module, **asked._asdict())

    if not ordinary:
        own("attention", "weights are asked for (need_weights)" if asked.need_weights else UNFIT)
        return before()
    try:
        masks = AttentionMasks(asked.key_padding_mask, asked.attn_mask, asked.is_causal)
        return multihead_attention(module, query, key, value, masks)
    except (TypeError, ValueError) as error:
        own("attention", str(error))
        return before()  # which says so in torch's own words
