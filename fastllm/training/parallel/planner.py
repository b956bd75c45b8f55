"""What a training run needs of its GPUs, before there are any: memory, communication, and the time of a step.

Formulae and where they come from are in the functions' docstrings; every rate is an input. What is kept for the
backward pass is not estimated but counted, by a forward pass of the model itself on tensors without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...config import InputError
from ...models.config import GATED, TransformerConfig

GIB = 2**30
# The most that the loss takes by itself, from 16,384 tokens on.
LOGITS_BYTES = 2400 * 2.0**20


class TooLarge(InputError):
    """Not even one sequence fits into a GPU's memory."""


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet: memory in bytes, dense bf16 FLOP/s, bytes/s to the GPUs of its node and to other nodes."""

    memory: float
    flops: float
    within: float
    between: float


# Vendor data sheets: bf16 without sparsity; NVLink in one direction; one 400 Gb/s (A100: 200 Gb/s) port for each GPU.
GPUS = {
    "a100": GPU(80e9, 312e12, 300e9, 25e9),
    "h100": GPU(80e9, 989e12, 450e9, 50e9),
    "h200": GPU(141e9, 989e12, 450e9, 50e9),
    "b200": GPU(180e9, 2250e12, 900e9, 50e9),
}


# The share of its peak that a GPU reaches while it computes, and the share of that time that can hide communication.
# Guesses.
EFFICIENCY, OVERLAP = 0.55, 0.8


@dataclass(frozen=True)
class Plan:
    """Per GPU and step: bytes by purpose, bytes sent, seconds, and the share of the GPU's rate that is useful."""

    model: TransformerConfig
    parameters: int
    gpus: int
    micro_batch: int
    largest_micro_batch: int
    micro_steps: int
    memory: dict[str, float]
    limit: float
    sent: dict[str, float]
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    mfu: float

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    def tokens_per_second(self, batch_tokens: int) -> float:
        return batch_tokens / self.step_seconds


def shape_of(parameters: float, context_length: int = 8192, vocab_size: int = 128256) -> TransformerConfig:
    """A Llama-shaped decoder of about ``parameters`` parameters.

    As Llama 3's models (Dubey et al. 2024, table 3) it has heads of 128, eight key/value heads, an MLP of 3.5 widths
    and a width of about 100 times the depth.

    Raises:
        InputError: too few parameters for such a shape.
    """

    def config(layers: int, heads: int) -> TransformerConfig:
        hidden = 128 * heads
        return TransformerConfig(
            vocab_size=vocab_size, context_length=context_length, num_layers=layers, num_heads=heads,
            num_kv_heads=math.gcd(heads, 8), hidden_size=hidden, intermediate_size=7 * hidden // 2, positions="rotary",
            rotary_base=500000.0, norm="rms", activation="swiglu", bias=False, tie_embeddings=parameters < 4e9,
        )  # fmt: skip

    # From eight heads on a multiple of eight, which the eight key/value heads divide.
    shapes = [
        (layers, heads)
        for layers in range(4, 300)
        for heads in (*range(2, 8), *range(8, 400, 8))
        if 75 <= 128 * heads / layers <= 135  # a guess: Llama 3's have 128, 102 and 130
    ]
    layers, heads = min(
        shapes,
        key=lambda shape: abs(math.log(parameter_count(config(*shape)) / parameters)),
    )
    found = config(layers, heads)
    # A guess of how far from what was asked a plan still helps.
    if abs(parameter_count(found) / parameters - 1) > 0.25:
        raise InputError(f"params: no decoder of this shape has about {parameters:,.0f} parameters; name a --preset")
    return found


def parameter_count(config: TransformerConfig) -> int:
    """Parameters of a decoder, a shared one counted once.

    Per layer: queries, keys, values and output of hidden x hidden (keys and values by their share of heads), two or,
    with a gate, three matrices of the MLP, two norms and what biases there are.
    """
    h, mlp = config.hidden_size, config.mlp_size
    qkv = config.head_dim * (config.num_heads + 2 * config.kv_heads)
    gates = 2 if config.activation in GATED else 1
    layer = h * qkv + config.head_dim * config.num_heads * h + h * mlp * (gates + 1)
    norm = h
    if config.bias:
        layer += qkv + h + gates * mlp + h
        norm += h if config.norm == "layer" else 0
    norms = 2 * config.num_layers + config.embedding_norm + (config.norm_position == "pre")
    return config.num_layers * layer + norms * norm + table_parameters(config) + _position_parameters(config)


def _position_parameters(config: TransformerConfig) -> int:
    """Parameters of the tables of positions and segments, which are looked up alone."""
    learned = config.context_length if config.positions == "learned" else 0
    relative = config.relative_buckets * config.num_heads if config.positions == "relative" else 0
    return (learned + config.segments) * config.hidden_size + relative


def table_parameters(config: TransformerConfig) -> int:
    """Parameters of the token embedding and of the head, a shared table counted once."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)


def kept_bytes(
    config: TransformerConfig, rows: int, dtype: str, checkpoint_activations: bool = False, narrow: bool = False
) -> int:
    """Bytes that the forward pass of ``rows`` whole contexts keeps for the backward, weights not counted.

    Counted on a forward pass with tensors that have no memory (FakeTensorMode): each storage that autograd saves, once.
    Layers are alike, so that models of one layer and of two are counted, and the rest follows.

    Args:
        dtype: "bfloat16" is autocast over fp32 weights; with ``narrow`` the weights are bf16 too, as FSDP gathers them.
    """
    one, two = (
        _kept_by(config, layers, rows, dtype, recompute=checkpoint_activations, narrow=narrow) for layers in (1, 2)
    )
    return one + (config.num_layers - 1) * (two - one)


def _kept_by(config: TransformerConfig, layers: int, rows: int, dtype: str, *, recompute: bool, narrow: bool) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...models import Transformer

    with FakeTensorMode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if narrow else torch.float32)
        try:
            model = Transformer(config.replace(num_layers=layers))
            model.train()
        finally:
            torch.set_default_dtype(before)
        model.checkpoint_activations = recompute
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}
        held: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
                held.append(tensor)  # so that no other storage gets its address
            return tensor

        tokens = torch.zeros(rows, config.context_length, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            model.loss(tokens, tokens)
        return sum(saved.values())


def _bytes_of_a_row(config: TransformerConfig, dtype: str, recompute: bool, narrow: bool) -> int:
    """What a sequence of a micro-batch takes while it is trained on."""
    row = kept_bytes(config, 1, dtype, recompute, narrow)
    if recompute:
        # The block that is being recomputed.
        one, two = (_kept_by(config, layers, 1, dtype, recompute=False, narrow=narrow) for layers in (1, 2))
        row += two - one
    return row


def _flops_of_a_token(config: TransformerConfig) -> int:
    """What :func:`fastllm.models.transformer.flops_per_token` counts on a model, without one."""
    looked_up = _position_parameters(config) + (0 if config.tie_embeddings else table_parameters(config) // 2)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * config.context_length
    return 6 * (parameter_count(config) - looked_up) + attention


def state_bytes(config: TransformerConfig, optimizer: str) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser state, all in fp32: 4 each a parameter, AdamW 8, Muon 4.

    (ZeRO's 16 bytes a parameter, Rajbhandari et al. 2020, section 3.1, without its copy in 16 bits.)
    """
    parameters = parameter_count(config)
    hidden = parameters - table_parameters(config)
    moments = 8 * parameters if optimizer == "adamw" else 8 * (parameters - hidden) + 4 * hidden
    return {"weights": 4.0 * parameters, "gradients": 4.0 * parameters, "optimizer state": float(moments)}


def sent_bytes(parameters: int, gpus: int, micro_steps: int, parallel: str) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by ring algorithms (Patarasuk and Yuan 2009): (n - 1) / n of a buffer for a
    gather or a scatter, twice that for an all-reduce.

    DDP all-reduces the fp32 gradients once. FSDP gathers bf16 weights for the forward and again for the backward pass
    of every micro-step, and scatters the sum of the fp32 gradients in the last (Zhao et al. 2023).
    """
    share = (gpus - 1) / gpus
    if parallel == "ddp":
        return {"all-reduce of gradients": 2 * share * 4 * parameters}
    return {
        "gathers of weights": 2 * share * 2 * parameters * micro_steps,
        "reduce-scatter of gradients": share * 4 * parameters,
    }


def plan(
    config: TransformerConfig, gpus: int, gpu: GPU, *, batch_tokens: int, parallel: str = "fsdp",
    optimizer: str = "muon", dtype: str = "bfloat16", checkpoint_activations: bool = False, gpus_per_node: int = 8,
    efficiency: float = EFFICIENCY, overlap: float = OVERLAP, reserve: float = 0.1, micro_batch: int | None = None,
) -> Plan:  # fmt: skip
    """Memory, communication and time of a training step.

    A micro-batch needs the bytes of :func:`kept_bytes` times rows, the logits' workspace, and for FSDP the bf16 weights
    and the fp32 gradients of two blocks and of the tables, gathered. Compute takes
    ``flops_per_token x tokens / (gpus x flops x efficiency)``, a third more with recomputation, which repeats the
    forward's third. Rings run at what a GPU's links or, over all its GPUs, a node's give; ``overlap`` of the compute
    time can hide them.

    Args:
        batch_tokens: of a whole step, over all GPUs.
        efficiency: of the GPU's peak while it computes.
        reserve: part of the memory that is left to CUDA, NCCL and fragmentation; its default is a guess.
        micro_batch: sequences in a forward pass; None: the largest that fits and divides the batch.

    Raises:
        TooLarge: not even one sequence fits.
        InputError: the batch has less than one sequence for each GPU.
    """
    parameters = parameter_count(config)
    sequences = batch_tokens // config.context_length // gpus
    if sequences < 1:
        raise InputError(
            f"batch_tokens: {batch_tokens:,} are less than one sequence of {config.context_length:,} for each of "
            f"{gpus:,} GPUs"
        )
    split = parallel == "fsdp" and gpus > 1
    memory = {name: size / (gpus if split else 1) for name, size in state_bytes(config, optimizer).items()}
    if split:
        block = (parameters - table_parameters(config)) / config.num_layers
        memory["gathered"] = (2 * block + table_parameters(config)) * (2 + 4)
    elif dtype == "bfloat16":
        memory["bf16 copies of weights"] = 2.0 * parameters
    memory["logits"] = LOGITS_BYTES
    row = _bytes_of_a_row(config, dtype, checkpoint_activations, narrow=split and dtype == "bfloat16")
    limit = gpu.memory * (1 - reserve)
    largest = int((limit - sum(memory.values())) // row)
    if largest < 1:
        raise TooLarge(
            f"one sequence does not fit: {(sum(memory.values()) + row) / GIB:.1f} GiB are needed, "
            f"{limit / GIB:.1f} GiB there; more GPUs, --parallel fsdp, --checkpoint-activations or a shorter context"
        )
    if micro_batch is None:
        micro_batch = max(rows for rows in range(1, min(largest, sequences) + 1) if sequences % rows == 0)
    memory["activations"] = float(row) * micro_batch
    micro_steps = -(-sequences // micro_batch)
    flops = _flops_of_a_token(config)
    done = flops * (4 / 3 if checkpoint_activations else 1)
    compute = done * batch_tokens / (gpus * gpu.flops * efficiency)
    sent = sent_bytes(parameters, gpus, micro_steps, parallel)
    # NCCL lays a ring through each GPU's port, so a node's ports carry its traffic together.
    link = gpu.within if gpus <= gpus_per_node else min(gpu.within, gpu.between * gpus_per_node)
    communication = sum(sent.values()) / link
    exposed = max(0.0, communication - overlap * compute)
    return Plan(
        model=config, parameters=parameters, gpus=gpus, micro_batch=micro_batch, largest_micro_batch=largest,
        micro_steps=micro_steps, memory=memory, limit=limit, sent=sent, compute_seconds=compute,
        communication_seconds=communication, exposed_seconds=exposed,
        mfu=flops * batch_tokens / (gpus * gpu.flops * (compute + exposed)),
    )  # fmt: skip
