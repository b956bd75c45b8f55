"""Attention of Hugging Face models, through transformers' AttentionInterface, for one instance at a time.

A module that attends asks its configuration which attention it is to call. The configuration is shared, with instances
and with the user, and stays what it is: the module gets another :func:`~.configuration.face` of it.

Ours gives no attention weights, as "sdpa" gives none. Models whose own attention is "eager", because sdpa cannot do
what they need, do give them. So a call of such a model in which somebody looks for weights takes the model's own path.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator

import torch
from torch import nn

from .attention_call import attention_forward, transformers_sdpa
from .calls import own
from .configuration import INTERNAL, NAME, Face, Switch, face, registered, switch_of, unfaced
from .masks import make_mask, rewrites_masks
from .plain import hooked
from .rules import Decision, obstacle
from .swap import Kind, forward_of, swap_forward

INTERFACE = Kind("attention_interface")
OWN_PATH = (
    "a call that asks for attention weights, or has a head mask or a hook on attention, takes the model's own path"
)
# What eager attention reads of its module and ours knows, and what ours takes.
READ_BY_EAGER = {"num_key_value_groups", "training", "head_dim", "is_causal", "scaling"}
TAKEN_BY_OURS = {
    "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias", "softcap",
    "s_aux",
}  # fmt: skip
# Modelling code that asks for "sdpa" by name does something else for every other answer.
_NAMES_SDPA = re.compile(r"_attn_implementation[^\n]*sdpa|sdpa[^\n]*_attn_implementation")


def attention_decisions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Decision]]:
    """For each transformers model within ``model`` (itself or an encoder, a decoder, a tower): swap it or why not."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then no module is an instance of its classes
        return
    for path, module in model.named_modules():
        if isinstance(module, modeling.PreTrainedModel) and getattr(module, "config", None) is not None:
            decision = _decide(module)
            if decision is not None:
                yield path, module, decision


def _decide(module) -> Decision | None:
    config = unfaced(module.config)
    now = getattr(config, "_attn_implementation", None)
    source = _source(type(module))
    attending = list(attending_within(module))
    if not attending:
        if re.search(r"class \w*Attention", source) and "ALL_ATTENTION_FUNCTIONS" not in source:
            return Decision("attention", None, "its code does not call attention through AttentionInterface")
        return None
    if now == NAME or all(isinstance(part.config, Face) for part in attending):
        return Decision("attention", None, "it is accelerated already")
    if _NAMES_SDPA.search(source):
        return Decision("attention", None, 'its code treats the attention called "sdpa" apart')
    if getattr(config, "output_attentions", False):
        return Decision("attention", None, "its configuration asks for attention weights, which are never computed")
    missing = _missing(config)
    if missing is not None:
        return Decision("attention", None, missing)
    if now == "sdpa":
        if not str(getattr(registered(now), "__module__", "")).startswith("transformers."):
            return Decision("attention", None, 'the function that is registered as "sdpa" is not transformers\'')
        return Decision("attention", INTERFACE, 'AttentionInterface, "sdpa" before')
    if now == "eager" and _needs_eager(module):
        unknown = [why for part in attending if (why := _reads_more(part)) is not None]
        why = unknown[0] if unknown else obstacle(module)
        if why is not None:
            return Decision("attention", None, why)
        return Decision("attention", INTERFACE, f'AttentionInterface, "eager" before; {OWN_PATH}')
    if now == "eager":
        return Decision("attention", None, '"eager" attention was asked for, which gives its weights')
    return Decision("attention", None, f'its attention is "{now}"')


def _needs_eager(module) -> bool:
    """Whether its attention is "eager" since its code, not its user, chose that: sdpa cannot do what it needs."""
    return not getattr(module, "_supports_sdpa", False) and getattr(module, "_supports_attention_backend", False)


def attending_within(model: nn.Module) -> Iterator[nn.Module]:
    """The modules within ``model`` that ask their configuration which attention to call, and call it."""
    for part in model.modules():
        if INTERNAL in getattr(vars(part).get("config"), "__dict__", ()) and _attends(type(part)):
            yield part


def _attends(cls: type) -> bool:
    methods = (inspect.unwrap(f) for c in cls.__mro__ for f in vars(c).values() if inspect.isfunction(f))
    # PreTrainedModel's own methods name the interface to check names of attention.
    return any(
        "ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names
        for method in methods
        if method.__module__ != "transformers.modeling_utils"
    )


def _reads_more(part) -> str | None:
    """What the eager attention of ``part``'s code reads from it that ours is not given; None where that is nothing."""
    eager = getattr(sys.modules.get(type(part).__module__), "eager_attention_forward", None)
    if eager is None:
        return "its code has no eager_attention_forward to compare ours with"
    try:
        read = set(re.findall(r"\bmodule\.(\w+)", inspect.getsource(eager)))
        taken = set(inspect.signature(eager).parameters)
    except (OSError, TypeError, ValueError):
        return "its eager attention cannot be read"
    given = re.findall(r"\b(\w+)=", inspect.getsource(type(part).forward))
    unknown = read - READ_BY_EAGER - ({"sinks"} if "s_aux" in given else set())
    unknown |= taken - TAKEN_BY_OURS - {"kwargs"}
    return f"its eager attention depends on {', '.join(sorted(unknown))}" if unknown else None


def _source(cls: type) -> str:
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        return ""


def _missing(config) -> str | None:
    """Why the installed transformers cannot be asked for an attention of ours, or None.

    All that attention here needs of it: whatever is looked up later is looked up here, so that a version that lacks it
    is found before anything is changed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        return f"this transformers lacks a part of the attention interface: {error}"
    for interface in (AttentionInterface, AttentionMaskInterface):
        if not callable(getattr(interface, "register", None)):
            return f"this transformers has no {interface.__name__}.register"
        for name in ("sdpa", "eager") if interface is AttentionMaskInterface else ("sdpa",):
            try:
                interface()[name]
            except (KeyError, TypeError) as error:
                return f'this transformers has no "{name}" in {interface.__name__} ({type(error).__name__}: {error})'
    if "_attn_implementation_internal" not in vars(config):
        return "this transformers keeps the name of the attention in another place of the configuration"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, functools.partial(make_mask, AttentionMaskInterface()))


def take_over(module: nn.Module, switches: dict[int, Switch]) -> None:
    """Let the modules within ``module`` that attend by its configuration call ours.

    Args:
        module: a transformers model.
        switches: the switches of configurations, by id, in the whole model; grows.
    """
    _register()
    config = unfaced(module.config)
    if config._attn_implementation == "eager":
        swap_forward(module, INTERFACE)  # first: where Python refuses, nothing has changed yet
    for part in attending_within(module):
        theirs = unfaced(part.config)
        if theirs is config or getattr(theirs, "_attn_implementation", None) == config._attn_implementation:
            switch = _switch(theirs, switches)
            switch.additive_masks |= switch.before == "eager" and rewrites_masks(type(part))
            part.config = face(theirs, switch, in_a_call=False)
    if config._attn_implementation == "eager":
        # Its masks are then made for ours, too, and each call says whether it can be ours.
        module.config = face(config, _switch(config, switches), in_a_call=True)


def _switch(config, switches: dict[int, Switch]) -> Switch:
    before = config._attn_implementation
    return switches.setdefault(id(config), Switch(before, _passed_over() if before == "sdpa" else frozenset()))


def _passed_over() -> frozenset[str]:
    """What the installed "sdpa" takes no notice of: that of transformers 5.0 drops Gemma 2's soft cap."""
    return frozenset({"softcap", "s_aux"} - set(inspect.signature(transformers_sdpa()).parameters))


def switches_within(model: nn.Module) -> dict[int, Switch]:
    """The switches of the configurations that have faces in ``model``, by the configurations' ids."""
    configs = (vars(part).get("config") for part in model.modules())
    found = ((id(unfaced(config)), switch_of(config)) for config in configs if isinstance(config, Face))
    return {key: switch for key, switch in found if switch is not None}


# Beside "config", a second place for it: the compiler of torch 2.11 takes what __dict__ has by that name for the
# property of that name, which would call itself endlessly.
_HELD = "fastllm_config"


def _config(module):
    """The configuration as everybody knows it, and its face while a forward of the model is at work.

    So the configuration of a language model stays the one that the configuration around it names.
    """
    state = module.__dict__
    if _HELD not in state and "config" not in state:
        raise AttributeError("config")
    config = state[_HELD] if _HELD in state else state["config"]
    switch = switch_of(config) if isinstance(config, Face) else None
    return config if switch is None or switch.at_work() else unfaced(config)


def _set_config(module, config) -> None:
    module.__dict__["config"] = module.__dict__[_HELD] = config


def _delete_config(module) -> None:
    module.__dict__.pop(_HELD, None)
    try:
        del module.__dict__["config"]
    except KeyError:
        raise AttributeError("config") from None


@forward_of("attention_interface", config=property(_config, _set_config, _delete_config))
def model_forward(module, original, options, *args, **kwargs):
    switch = switch_of(vars(module).get("config"))
    if switch is None:
        return original(module, *args, **kwargs)
    # Masks for ours look at the values of the padding mask.
    meta = any(isinstance(t, torch.Tensor) and t.is_meta for t in (*args, *kwargs.values()))
    takes_own = meta or _looks_for_weights(module, original, args, kwargs)
    if takes_own:
        own("attention", OWN_PATH)
    if torch.compiler.is_compiling():
        switch.last = takes_own
        return original(module, *args, **kwargs)
    with switch.call(takes_own):
        return original(module, *args, **kwargs)


def _looks_for_weights(module, original, args, kwargs) -> bool:
    """Whether this call asks for what only the model's own attention computes."""
    if args:
        names = list(inspect.signature(original).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, value in kwargs.items():
        if "head_mask" in name and value is not None:
            return True
        if name.startswith("output_") and name.endswith("attentions") and value:
            return True
    if getattr(module.config, "output_attentions", False) and kwargs.get("output_attentions") is None:
        return True
    if torch.nn.modules.module._global_forward_hooks:
        return True
    return any(_watched(part) for part in module.modules() if isinstance(vars(part).get("config"), Face))


def _watched(part: nn.Module) -> bool:
    """Whether somebody but transformers, which hooks attention for good at the first request, looks at ``part``."""
    hooks = part._forward_hooks.values()
    if hooks and all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        return bool(part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
    return hooked(part)


def give_back(model: nn.Module) -> int:
    """Undo :func:`take_over` in all of ``model``; returns how many modules within it had been given the attention.

    The configurations are what their users have made of them since.
    """
    changed = 0
    for part in model.modules():
        config = vars(part).get("config")
        if isinstance(config, Face):
            part.config = unfaced(config)
            changed += 1
        vars(part).pop(_HELD, None)
    return changed
