"""What the planner says, against what a model really has and a step really takes."""

import pytest
import torch
from toy import TOY

from fastllm.cli import main
from fastllm.models import PRESETS, Transformer, TransformerConfig
from fastllm.training import TrainingConfig
from fastllm.training.objectives import CausalLM
from fastllm.training.optimizer import Optimizers
from fastllm.training.parallel.planner import (
    GPUS,
    TooLarge,
    kept_bytes,
    parameter_count,
    plan,
    sent_bytes,
    shape_of,
    state_bytes,
)
from fastllm.training.step import StepSettings, train_step

SHAPES = [
    TOY,
    TOY.replace(bias=True, norm="layer", positions="learned", tie_embeddings=False, activation="gelu"),
    TOY.replace(activation="swiglu", num_kv_heads=1, embedding_norm=True),
    TOY.replace(activation="geglu", head_size=2 * TOY.head_dim, positions="relative", norm_position="post", segments=2),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_without_building_them(shape):
    assert parameter_count(shape) == Transformer(shape).num_parameters()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_a_token_are_the_models(shape):
    gpu, tokens = GPUS["h200"], 4 * shape.context_length
    computed = plan(shape, 1, gpu, batch_tokens=tokens, efficiency=1.0).compute_seconds * gpu.flops / tokens
    assert computed == pytest.approx(Transformer(shape).flops_per_token())


def test_the_published_sizes_are_met():
    assert parameter_count(PRESETS["gpt2"]) == 124_439_808
    assert parameter_count(PRESETS["llama-8b"]) == 8_030_261_248
    # Heads come in eights, so small shapes are further apart: 17% off at 1e9, at most 0.5% at the others.
    for size, apart in ((1e9, 0.18), (8e9, 0.005), (70e9, 0.005), (405e9, 0.005)):
        assert parameter_count(shape_of(size)) == pytest.approx(size, rel=apart)


def peak_of_third_step(shape, rows, dtype, recompute, device):
    """The most bytes that torch's allocator held during step 3, beyond what was there when it began."""
    model = Transformer(shape).to(device)
    model.checkpoint_activations = recompute
    optimizers = Optimizers(model, TrainingConfig(optimizer="adamw"))
    batch = {name: torch.randint(shape.vocab_size, (rows, shape.context_length)) for name in ("tokens", "targets")}

    def step():
        train_step(CausalLM, model, optimizers, batch, StepSettings(rows, 1.0, dtype))

    step()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# The count is of the operators that a CPU takes. A GPU's kernels keep other things of a size, which the second number
# allows for, and its shape is large enough for that to be all that differs.
ON_CPU = ("cpu", {"context_length": 64, "hidden_size": 128}, (1.0, 1.1))
ON_GPU = ("cuda", {"context_length": 512, "hidden_size": 512}, (0.75, 1.25))


@pytest.mark.parametrize(("dtype", "recompute"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize(
    ("device", "size", "tolerance"),
    [ON_CPU, pytest.param(*ON_GPU, marks=pytest.mark.runs_on("gpu"))],
)
def test_the_memory_of_a_step_is_what_was_planned(device, size, tolerance, dtype, recompute):
    shape = TransformerConfig(
        vocab_size=512, num_layers=4, num_heads=4, activation="swiglu", norm="rms", positions="rotary", bias=False,
        **size,
    )  # fmt: skip
    rows = 8
    kept = kept_bytes(shape, rows, dtype, recompute)
    gradients = state_bytes(shape, "adamw")["gradients"]
    measured = peak_of_third_step(shape, rows, dtype, recompute, device)
    # Beyond what is kept: the gradients of what is being worked on, at most those of one block and of the logits.
    inside = kept_bytes(shape.replace(num_layers=2), rows, dtype) - kept_bytes(shape.replace(num_layers=1), rows, dtype)
    logits = 3 * 4 * rows * shape.context_length * shape.vocab_size
    # Of what is kept, the batch's token ids (int64) were there before the step began. The rest can be the whole peak,
    # where the backward's own tensors fit into what it has freed: at AVX2 the two were 44 bytes apart.
    tokens = 8 * rows * shape.context_length
    least, most = tolerance
    assert least * (kept - tokens) <= measured <= most * (kept + gradients + inside + logits)
    assert (kept < kept_bytes(shape, rows, dtype) / 3) == recompute


def test_communication_is_that_of_rings():
    assert sent_bytes(100, 2, 4, "ddp") == {"all-reduce of gradients": 400.0}
    assert sent_bytes(100, 4, 3, "fsdp") == {"gathers of weights": 900.0, "reduce-scatter of gradients": 300.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_as_large_as_planned(optimizer):
    shape = SHAPES[2]
    model = Transformer(shape)
    optimizers = Optimizers(model, TrainingConfig(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    held = sum(tensor.nbytes for tensor in optimizers.state_dict().values() if tensor.dim())
    # The planner takes the norms, which are AdamW's, for Muon's.
    norms = 4 * sum(p.numel() for p in model.parameters() if p.dim() < 2) if optimizer == "muon" else 0
    assert state_bytes(shape, optimizer)["optimizer state"] == held - norms


def test_a_ring_over_nodes_is_as_fast_as_a_nodes_ports_together():
    shape, gpu = shape_of(8e9), GPUS["h100"]
    settings = dict(batch_tokens=1 << 22, micro_batch=1)
    for gpus, link in ((8, gpu.within), (16, 8 * gpu.between)):
        found = plan(shape, gpus, gpu, **settings)
        assert found.communication_seconds == pytest.approx(sum(found.sent.values()) / link)
    assert plan(shape, 16, gpu, **settings, gpus_per_node=2).communication_seconds == pytest.approx(
        sum(found.sent.values()) / (2 * gpu.between)
    )
    # No faster than within a node.
    assert plan(shape, 64, gpu, **settings, gpus_per_node=32).communication_seconds == pytest.approx(
        sum(plan(shape, 64, gpu, **settings).sent.values()) / gpu.within
    )


def test_recomputation_needs_the_memory_of_the_block_that_is_recomputed():
    shape = shape_of(8e9)
    found = plan(shape, 64, GPUS["h100"], batch_tokens=1 << 22, micro_batch=1, checkpoint_activations=True)
    kept, whole = (kept_bytes(shape, 1, "bfloat16", recompute, narrow=True) for recompute in (True, False))
    block = (whole - kept_bytes(shape.replace(num_layers=1), 1, "bfloat16", narrow=True)) / (shape.num_layers - 1)
    assert found.memory["activations"] == pytest.approx(kept + block)


def test_a_plan_adds_up_and_the_largest_micro_batch_is_the_largest():
    small = PRESETS["gpt2"].replace(num_layers=2, context_length=128)
    settings = {"batch_tokens": 128 * 64, "dtype": "bfloat16"}
    result = plan(small, 1, GPUS["h200"], **settings)
    assert result.micro_batch == 64
    assert result.mfu == pytest.approx(0.55)
    spare = sum(result.memory.values()) - result.memory["activations"]
    row = result.memory["activations"] / 64
    tight = GPUS["h200"].__class__((spare + 10.5 * row) / 0.9, 1e15, 1e11, 1e10)
    tight_plan = plan(small, 1, tight, **settings)
    assert (tight_plan.largest_micro_batch, tight_plan.micro_batch, tight_plan.micro_steps) == (10, 8, 8)
    with pytest.raises(TooLarge, match="one sequence does not fit"):
        plan(small, 1, GPUS["h200"].__class__(spare, 1e15, 1e11, 1e10), **settings)
    assert plan(small, 8, tight, batch_tokens=128 * 64).memory["weights"] == pytest.approx(result.memory["weights"] / 8)


def test_the_command(capsys):
    assert main(["plan", "--gpus", "1024", "--params", "70b"]) == 0
    out = capsys.readouterr().out
    for expected in ("1,024 x h200, fsdp", "GiB", "reduce-scatter", "expected MFU", "checkpoint-activations"):
        assert expected in out
    assert main(["plan", "--gpus", "0"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--params", "0"])
    assert main(["plan", "--params", "70b", "--gpus", "1"]) == 2
    err = capsys.readouterr().err
    assert "--gpus: expected at least 1" in err
    assert "--params: expected a number above 0" in err
    assert "one sequence does not fit" in err
