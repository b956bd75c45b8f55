"""The bundled model's whole training step beside the same model in plain PyTorch.

    python -m fastllm.bench.train [--preset small] [--batch-size 16] [--dtype bfloat16] [--steps 5] [--rounds 7] ...

Every provider starts from the same weights and takes the same batches. Before anything is timed, each takes CHECKED
steps and its losses must equal fastllm's; one that differs, or fails, is reported with the reason and without a time.
Then they take turns, --steps steps a turn. A step is forward, backward, clipping of the gradient's norm and AdamW, in
one precision for all (bfloat16 is autocast over fp32 weights) but for nanoGPT as it ships, which is fp32 on a CPU.

Speed-up: the quartiles, over the rounds, of the ratio of times within a round. MFU: tokens a second times
Transformer.flops_per_token over the matrix rate measured at the end. Peak memory: what torch's allocator held at
most during a provider's turns, on CUDA only.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import cpu
from ..commands.parser import Parser
from ..matmul import matmul_flops
from ..models import PRESETS, Transformer, TransformerConfig
from ..training.config import TrainingConfig
from ..training.device import autocast
from ..training.objectives import CausalLM
from ..training.optimizer import Optimizers
from ..training.step import StepSettings, train_step
from .environment import environment
from .plain import PlainTransformer
from .timing import Quartiles, interleaved, ratios, seconds, synchronize

OURS = "fastllm"
CHECKED = 3
CLIP = 1.0
# Losses of the same weights and batches: rounding in bf16, 4 of its eps of the loss; in fp32, what AdamW's division by
# small second moments makes of eps-sized differences in three steps.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 4 * 2**-8}

Batch = tuple[torch.Tensor, torch.Tensor]
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
            CausalLM, model, optimizers, dict(zip(("tokens", "targets"), batch, strict=True)), settings
        ).loss

    return step


def _plain_step(loss_function, parameters, optimizer, device, dtype) -> Step:
    def step(batch):
        with autocast(device, dtype):
            loss = loss_function(*batch)
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
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
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
    return _plain_step(torch.compile(plain.loss), plain.parameters(), optimizer, setting.device, setting.dtype)


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
    model = GPT2LMHeadModel(
        GPT2Config(
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
    spec = importlib.util.spec_from_file_location("nanogpt_model", setting.nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(
        module.GPTConfig(
            block_size=config.context_length, vocab_size=config.vocab_size, n_layer=config.num_layers,
            n_head=config.num_heads, n_embd=config.hidden_size, dropout=config.dropout, bias=config.bias,
        )
    ).to(setting.device)  # fmt: skip
    model.load_state_dict(nanogpt_weights(setting.model.state_dict()), strict=True)
    training = setting.training
    optimizer = model.configure_optimizers(
        training.weight_decay, training.lr, (training.beta1, training.beta2), setting.device.type
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


@dataclass(frozen=True)
class Row:
    """One provider: why it was not timed, or its times. ``samples`` are seconds a step."""

    provider: str
    problem: str | None
    losses: list[float]
    samples: list[float]
    tokens_per_second: Quartiles | None = None
    speedup: Quartiles | None = None
    mfu: float | None = None
    peak_bytes: int | None = None


def batches(config: TransformerConfig, batch_size: int, count: int, device: torch.device) -> list[Batch]:
    """Random tokens and, as targets, the tokens after them."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, batch_size, config.context_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def compare(
    setting: Setting,
    names: list[str],
    *,
    steps: int,
    rounds: int,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Sets the providers up, checks their losses, times those that agree in turns; ours comes first.

    Args:
        names: keys of :data:`PROVIDERS` beside ours.
        steps, rounds: steps a turn, and turns of each provider.
        tell: takes progress lines.
    """
    config, device, dtype = setting.model.config, setting.device, setting.dtype
    data = batches(config, setting.training.batch_size, max(CHECKED, steps), device)
    tolerance = LOSS_TOLERANCE[dtype]
    taken: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    problems: dict[str, str] = {}
    for name in [OURS, *names]:
        tell(f"{name}: {CHECKED} steps, losses compared")
        try:
            step = PROVIDERS[name](setting)
            losses[name] = [float(step(batch)) for batch in data[:CHECKED]]
        except Exception as error:
            if name == OURS:
                raise
            lines = str(error).strip().splitlines()
            problems[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            continue
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses[OURS], strict=True))
        if not math.isfinite(sum(losses[name])) or worst > tolerance:
            problems[name] = (
                f"losses {losses[name]} differ from {losses[OURS]} by {worst:.1e}, more than {tolerance:.1e}"
            )
        else:
            taken[name] = step

    def turn(name: str) -> None:
        for batch in data[:steps]:
            taken[name](batch)

    peaks: dict[str, int] = {}

    def timed(run, where):
        if where.type != "cuda":
            return seconds(run, where)
        synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        elapsed = seconds(run, where)
        peaks[run.args[0]] = max(peaks.get(run.args[0], 0), torch.cuda.max_memory_allocated(where))
        return elapsed

    tell(f"{rounds} rounds of {steps} steps each")
    samples = interleaved({n: functools.partial(turn, n) for n in taken}, rounds, device, timer=timed)
    rate = matmul_flops(device, getattr(torch, dtype))
    tokens = setting.training.batch_size * config.context_length
    rows = [Row(name, problem, losses.get(name, []), []) for name, problem in problems.items()]
    for name in taken:
        per_step = [s / steps for s in samples[name]]
        speed = Quartiles.of([tokens / s for s in per_step])
        mfu = speed.median * setting.model.flops_per_token() / rate
        rows.append(Row(name, None, losses[name], per_step, speed, ratios(samples, OURS, name), mfu, peaks.get(name)))
    return sorted(rows, key=lambda row: [OURS, *names].index(row.provider))


def table(rows: list[Row], title: str):
    """The rows as a rich table."""
    from rich.table import Table

    columns = ("provider", "tok/s", "quartiles", "ms/step", "MFU", "peak GiB", "loss", "fastllm is")
    shown = Table(*columns, title=title)
    for row in rows:
        if row.problem:
            shown.add_row(row.provider, f"not timed: {row.problem}")
            continue
        q, ratio = row.tokens_per_second, row.speedup
        shown.add_row(
            row.provider,
            f"{q.median:,.0f}",
            f"{q.low:,.0f} to {q.high:,.0f}",
            f"{Quartiles.of(row.samples).median * 1e3:,.1f}",
            f"{row.mfu:.0%}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
            f"{row.losses[-1]:.4f}",
            "" if row.provider == OURS else f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m fastllm.bench.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="the model (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences a step (default: %(default)s)"
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens a sequence (default: the preset's)")
    parser.add_argument(
        "--dtype", choices=list(LOSS_TOLERANCE), help="(default: bfloat16; float32 on a CPU without products of it)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also plain PyTorch under torch.compile")
    parser.add_argument("--hugging-face", action="store_true", help="also transformers' GPT-2")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="also nanoGPT, from its checkout there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the environment there")
    options = parser.parse_args(argv)
    for name in ("batch_size", "context_length", "steps", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.nanogpt is not None and not (options.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: {options.nanogpt} has no model.py")
    config = PRESETS[options.preset].replace(dropout=0.0)  # equal losses need equal masks, or none
    if options.context_length:
        config = config.replace(context_length=options.context_length)
    device = torch.device(options.device)
    options.dtype = options.dtype or cpu.precision(device)
    torch.manual_seed(0)
    setting = Setting(
        model=Transformer(config).to(device),
        training=TrainingConfig(batch_size=options.batch_size, optimizer="adamw", lr=3e-4),
        dtype=options.dtype,
        device=device,
        nanogpt=options.nanogpt,
    )
    names = ["PyTorch eager"]
    names += ["torch.compile"] if options.compile else []
    names += ["transformers"] if options.hugging_face else []
    names += ["nanoGPT"] if options.nanogpt else []
    rows = compare(setting, names, steps=options.steps, rounds=options.rounds)
    found = environment(device)
    if options.json:
        content = {
            "environment": found,
            "model": asdict(config),
            "options": vars(options),
            "rows": [*map(asdict, rows)],
        }
        options.json.write_text(json.dumps(content, default=str, indent=1))
    title = (
        f"{options.preset}, batch {options.batch_size} x {config.context_length}, {options.dtype}, {found['device']}"
    )
    try:
        from .report import console
    except ModuleNotFoundError as error:
        print(f"no table: the package {error.name} is not installed")
    else:
        console().print(table(rows, title))


if __name__ == "__main__":
    main()
