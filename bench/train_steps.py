"""The training steps that bench/train.py times: ours, plain PyTorch, torch.compile, transformers and nanoGPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .. import cpu
from ..models import Transformer, TransformerConfig
from ..training.config import TrainingConfig
from ..training.device import autocast
from ..training.objectives import Batch, CausalLM, Objective, to_device
from ..training.optimizer import Optimizers
from ..training.step import StepSettings, train_step
from .module_files import module_of
from .plain import PlainTransformer

OURS = "fastllm"
CLIP = 1.0

# Of a batch's ``tokens`` and ``targets`` in host memory, from where every provider moves it by ``to_device``.
Step = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """What every provider is given."""

    model: Transformer
    training: TrainingConfig
    dtype: str
    device: torch.device
    nanogpt: Path | None = None


def ours(setting: Setting) -> Step:
    """fastllm's own training step."""
    model = Transformer(setting.model.config).to(setting.device)
    model.load_state_dict(setting.model.state_dict())
    optimizers = Optimizers(model, setting.training)
    settings = StepSettings(setting.training.rows, CLIP, setting.dtype)

    def step(batch):
        return train_step(
            # Its class: what a step asks of it is static.
            cast(Objective, CausalLM),
            model,
            optimizers,
            batch,
            settings,
        ).loss

    return step


def _plain_step(loss_function, parameters, optimizer, device, dtype) -> Step:
    def step(batch):
        moved = to_device(batch, device)
        with autocast(device, dtype):
            loss = loss_function(moved["tokens"], moved["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _adamw(named_parameters, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as it comes, with the decay on matrices that fastllm's optimiser has."""
    named = list(named_parameters)

    def table(name):
        return any(part in name for part in ("embedding", "head.weight", "wte", "wpe"))

    matrices = [p for name, p in named if p.ndim == 2 and not table(name)]
    others = [p for name, p in named if p.ndim != 2 or table(name)]
    groups = [{"params": matrices, "weight_decay": training.hidden_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(training.beta1, training.beta2))


def eager(setting: Setting) -> Step:
    """torch.nn.functional, eager."""
    plain = PlainTransformer(setting.model)
    optimizer = _adamw(plain.weights.items(), setting.training)
    return _plain_step(plain.loss, plain.parameters(), optimizer, setting.device, setting.dtype)


def compiled(setting: Setting) -> Step:
    """torch.nn.functional under torch.compile."""
    plain = PlainTransformer(setting.model)
    optimizer = _adamw(plain.weights.items(), setting.training)
    return _plain_step(cpu.compiled(plain.loss), plain.parameters(), optimizer, setting.device, setting.dtype)


# nanoGPT's names for our parameters, within a block and outside.
_NANOGPT_BLOCK = {
    "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_NANOGPT = {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f"}


def nanogpt_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A :class:`Transformer`'s state_dict under nanoGPT's names."""
    renamed = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, number, rest = module.split(".", 2)
            module = f"transformer.h.{number}.{_NANOGPT_BLOCK[rest]}"
        elif module == "head":
            module = "lm_head"
        else:
            module = _NANOGPT[module]
        renamed[f"{module}.{kind}"] = tensor
    return renamed


def _check_shape(who: str, config: TransformerConfig) -> None:
    """GPT-2's shape is all that ``who`` has; ValueError for another."""
    wanted = dict(
        positions="learned", norm="layer", activation="gelu", tie_embeddings=True, embedding_norm=False, qk_norm=False,
        num_kv_heads=None, intermediate_size=None, norm_eps=1e-5,
    )  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"{who} has only {name}={value!r}, the model has {getattr(config, name)!r}")


def hugging_face(setting: Setting) -> Step:
    """transformers' GPT-2, with its scaled_dot_product_attention and its own loss; ValueError for another shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = setting.model.config
    _check_shape("transformers' GPT-2", config)
    # transformers' decorators hide what their classes take.
    make_config: Any = GPT2Config
    make_model: Any = GPT2LMHeadModel
    model = make_model(
        make_config(
            vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, activation_function="gelu", use_cache=False,
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            layer_norm_epsilon=config.norm_eps, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
        )
    ).to(setting.device).train()  # fmt: skip
    state = nanogpt_weights(setting.model.state_dict())  # nanoGPT took its names from here, but not the layout
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: tensor.t() if name.endswith(turned) else tensor for name, tensor in state.items()}
    if not config.bias:
        # It always has biases: zeros that stay.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                state[name] = torch.zeros_like(parameter)
                parameter.requires_grad_(False)
    model.load_state_dict(state, strict=True)

    def loss(tokens, targets):
        return model(tokens, labels=targets, shift_labels=targets).loss

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = _adamw(trained.items(), setting.training)
    return _plain_step(loss, list(trained.values()), optimizer, setting.device, setting.dtype)


def nanogpt(setting: Setting) -> Step:
    """nanoGPT's model and optimiser from the checkout that the user names, as train.py there runs them.

    Raises:
        ValueError: it has no model of this configuration.
    """
    config = setting.model.config
    _check_shape("nanoGPT", config)
    assert setting.nanogpt is not None, "the caller names the checkout"
    module = module_of(setting.nanogpt / "model.py", "nanogpt_model")
    model = module.GPT(
        module.GPTConfig(
            block_size=config.context_length, vocab_size=config.vocab_size, n_layer=config.num_layers,
            n_head=config.num_heads, n_embd=config.hidden_size, dropout=config.dropout, bias=config.bias,
        )
    ).to(setting.device)  # fmt: skip
    model.load_state_dict(nanogpt_weights(setting.model.state_dict()), strict=True)
    training = setting.training
    optimizer = model.configure_optimizers(
        training.hidden_decay, training.lr, (training.beta1, training.beta2), setting.device.type
    )
    dtype = setting.dtype if setting.device.type == "cuda" else "float32"  # train.py: no autocast on a CPU

    def loss(tokens, targets):
        return model(tokens, targets)[1]

    return _plain_step(loss, list(model.parameters()), optimizer, setting.device, dtype)


PROVIDERS: dict[str, Callable[[Setting], Step]] = {
    OURS: ours,
    "PyTorch eager": eager,
    "torch.compile": compiled,
    "transformers": hugging_face,
    "nanoGPT": nanogpt,
}
