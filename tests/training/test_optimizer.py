"""Muon and AdamW: groups of parameters, updates, state."""

from dataclasses import replace

import pytest
import torch
from toy import TOY

from fastllm.models import Transformer, build_model
from fastllm.training import TrainingConfig
from fastllm.training import orthogonal as orthogonal_module
from fastllm.training.optimizer import Optimizers, parameter_groups
from fastllm.training.orthogonal import orthogonal

pytestmark = pytest.mark.usefixtures("short_runs")
GPT = replace(TOY, positions="learned", norm="layer", activation="gelu", bias=True, tie_embeddings=False)


@pytest.mark.parametrize("shape", [TOY, GPT])
def test_every_parameter_has_one_group_and_tables_and_vectors_none_of_muon(shape):
    model = Transformer(shape)
    groups = parameter_groups(model)
    assert sorted(name for group in groups.values() for name, _ in group) == sorted(
        name for name, _ in model.named_parameters()
    )
    assert {name.split(".")[0] for name, _ in groups["hidden"]} == {"blocks"}
    assert all(p.ndim == 2 for _, p in groups["hidden"])
    assert all(p.ndim == 1 for _, p in groups["vector"])
    assert len(groups["embedding"]) == (1 if shape is TOY else 3)


def test_a_matrix_with_as_many_rows_as_the_vocabulary_is_no_head():
    shape = replace(TOY, vocab_size=TOY.mlp_size)
    names = {name for name, _ in parameter_groups(Transformer(shape))["hidden"]}
    assert names == {name for name, _ in parameter_groups(Transformer(TOY))["hidden"]}


@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize("decades", [0, 6])
def test_the_factor_of_a_long_matrix_in_float32_is_that_of_the_iteration(rows, decades, monkeypatch):
    left, right = (torch.linalg.qr(torch.randn(n, 64, dtype=torch.float64))[0] for n in (rows, 64))
    matrix = left * torch.logspace(0, -decades, 64, dtype=torch.float64) @ right.T
    factors = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device, dtype=dtype: dtype)
        factors[dtype] = orthogonal(matrix.to(dtype)).double()
    errors = {dtype: (factor - factors[torch.float64]).norm() for dtype, factor in factors.items()}
    assert errors[torch.float32] <= 0.01 * errors[torch.bfloat16]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizers_match_torchs_own_with_decay_on_matrices_only(optimizer, monkeypatch):
    monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device: torch.bfloat16)  # as torch's, on any CPU
    config = TrainingConfig(optimizer=optimizer, embedding_weight_decay=0.3)
    model, twin = Transformer(GPT), Transformer(GPT)
    twin.load_state_dict(model.state_dict())
    ours = Optimizers(model, config)
    groups = parameter_groups(twin)
    hidden = [p for _, p in groups["hidden"]]
    # Queries, keys and values are matrices of their own.
    together = {name: p for name, p in groups["hidden"] if "qkv" in name}
    assert together
    apart = {name: [torch.nn.Parameter(part.clone()) for part in p.chunk(3)] for name, p in together.items()}
    split = [p for name, p in groups["hidden"] if name not in together]
    split += [part for some in apart.values() for part in some]
    theirs = [
        torch.optim.Muon(split, lr=0.02, weight_decay=0.1, momentum=0.95)
        if optimizer == "muon"
        else torch.optim.AdamW(hidden, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        torch.optim.AdamW(
            [p for _, p in groups["embedding"]], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.3, fused=True
        ),
        torch.optim.AdamW([p for _, p in groups["vector"]], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for scale in (1.0, 0.5):
        ours.set_scale(scale)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for name, p in together.items():
            for part, grad in zip(apart[name], p.grad.chunk(3), strict=True):
                part.grad = grad.clone()
        ours.step()
        for one in theirs:
            for group in one.param_groups:
                group["lr"] = scale * (0.02 if isinstance(one, torch.optim.Muon) else 3e-3)
            one.step()
    if optimizer == "muon":
        for name, p in together.items():
            p.data = torch.cat(apart[name])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "shape",
    [
        replace(GPT, num_heads=4, num_kv_heads=2),
        replace(GPT, num_heads=4, num_kv_heads=1, encoder="transformer", decoder="transformer"),
        replace(TOY, positions="learned", qk_norm=False, encoder="gru", decoder="gru"),
    ],
    ids=["grouped", "encoder_decoder", "recurrent"],
)
def test_muons_update_of_one_map_does_not_depend_on_the_gradients_of_its_neighbours(shape):
    """A gradient of values that is 100 times as large leaves the bits of queries and keys as they were."""
    config = TrainingConfig(optimizer="muon")
    results = []
    for factor in (1, 100):
        torch.manual_seed(1)
        model = build_model(shape)
        optimizers = Optimizers(model, config)
        width = shape.kv_heads * shape.head_dim
        joint = {n: p for n, p in model.named_parameters() if n.endswith(("qkv.weight", "key_value.weight"))}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p in joint.values():
            p.grad[-width:] *= factor
        optimizers.step()
        results.append({name: p.detach()[:-width] for name, p in joint.items()})
    assert results[0]
    for name, rows in results[0].items():
        assert torch.equal(rows, results[1][name]), name


def test_optimizer_state_survives_a_round_trip_and_a_stranger_is_refused():
    model = Transformer(TOY)
    optimizers = Optimizers(model, TrainingConfig())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step()
    state = optimizers.state_dict()
    assert set(state) == {f"{n}:momentum_buffer" for n, _ in parameter_groups(model)["hidden"]} | {
        f"{n}:{key}"
        for kind in ("embedding", "vector")
        for n, _ in parameter_groups(model)[kind]
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    fresh = Optimizers(model, TrainingConfig())
    fresh.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    with pytest.raises(ValueError, match="unknown parameter: head"):
        fresh.load_state_dict({"head:step": torch.zeros(())})
    name, parameter = parameter_groups(model)["hidden"][0]
    with pytest.raises(ValueError, match=f"{name}:exp_avg: Muon, which trains it, keeps momentum_buffer"):
        fresh.load_state_dict({f"{name}:exp_avg": torch.zeros_like(parameter)})
