"""Muon and AdamW: groups of parameters, updates, state."""

from dataclasses import replace

import pytest
import torch
from toy import TOY

from fastllm.models import Transformer, build_model
from fastllm.training import TrainingConfig
from fastllm.training import optimizer as optimizer_module
from fastllm.training import orthogonal as orthogonal_module
from fastllm.training.optimizer import AdamW, Optimizers, parameter_groups
from fastllm.training.orthogonal import orthogonal

pytestmark = pytest.mark.usefixtures("short_runs")
OUTPUTS = ("out.weight", "down.weight")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (48, 64)])
def test_of_several_matrices_each_gets_the_factor_that_it_has_alone(shape, dtype, monkeypatch):
    monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device: dtype)
    several = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    # A sum in another order is another rounding, which the iteration may carry on.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for one, factor in zip(several, orthogonal(several), strict=True):
        torch.testing.assert_close(factor, orthogonal(one), rtol=tolerance, atol=tolerance)


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


def blocks(weight: torch.Tensor, name: str, size: int) -> tuple[torch.Tensor, ...]:
    """The (size, hidden_size) blocks of a hidden weight: of a layer that ends a branch, transposed."""
    return (weight.T if name.endswith(OUTPUTS) else weight).split(size)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizers_match_torchs_own_with_decay_on_matrices_only(optimizer, monkeypatch):
    monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device: torch.bfloat16)  # as torch's, on any CPU
    monkeypatch.setattr(optimizer_module, "_NEURONS", 16)  # as many as there are features in a head
    config = TrainingConfig(optimizer=optimizer, embedding_weight_decay=0.3)
    model, twin = Transformer(GPT), Transformer(GPT)
    twin.load_state_dict(model.state_dict())
    ours = Optimizers(model, config)
    groups = parameter_groups(twin)
    hidden = [p for _, p in groups["hidden"]]
    # Each block is a matrix of its own. Of the MLP's second, with four blocks in a row, each has half of the update.
    apart = {n: [torch.nn.Parameter(part.clone()) for part in blocks(p, n, 16)] for n, p in groups["hidden"]}
    halved = [part for name, some in apart.items() if "down" in name for part in some]
    others = [part for name, some in apart.items() if "down" not in name for part in some]
    split = [{"params": others}, {"params": halved, "lr": 0.01, "weight_decay": 0.2}]
    theirs = [
        torch.optim.Muon(split, lr=0.02, weight_decay=0.1, momentum=0.95)
        if optimizer == "muon"
        else torch.optim.AdamW(hidden, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        torch.optim.AdamW(
            [p for _, p in groups["embedding"]], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.3, fused=True
        ),
        torch.optim.AdamW([p for _, p in groups["vector"]], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [[group["lr"] for group in one.param_groups] for one in theirs]
    for scale in (1.0, 0.5):
        ours.set_scale(scale)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for name, p in groups["hidden"] if optimizer == "muon" else ():
            for part, grad in zip(apart[name], blocks(p.grad, name, 16), strict=True):
                part.grad = grad.clone()
        ours.step()
        for one, peak in zip(theirs, peaks, strict=True):
            for group, lr in zip(one.param_groups, peak, strict=True):
                group["lr"] = scale * lr
            one.step()
    if optimizer == "muon":
        for name, p in groups["hidden"]:
            p.data = torch.cat(apart[name]).T if name.endswith(OUTPUTS) else torch.cat(apart[name])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "shape",
    [
        replace(GPT, num_heads=4, num_kv_heads=2),
        replace(GPT, num_heads=4, num_kv_heads=1, encoder="transformer", decoder="transformer", intermediate_size=100),
        replace(TOY, positions="learned", qk_norm=False, encoder="gru", decoder="gru"),
    ],
    ids=["grouped", "encoder_decoder", "recurrent"],
)
def test_muons_update_of_a_block_does_not_depend_on_the_gradients_of_its_neighbours(shape):
    """A gradient of one head, or of some neurons, that is 100 times as large leaves the bits of the others."""

    def rest(name: str, weight: torch.Tensor) -> torch.Tensor:
        """All but the last block, which has 36 neurons of 100."""
        neurons = 36 if shape.mlp_size == 100 else 64
        count = neurons if "mlp" in name else shape.head_dim
        return weight[:, :-count] if name.endswith(OUTPUTS) else weight[:-count]

    results = []
    for factor in (1, 100):
        torch.manual_seed(1)
        model = build_model(shape)
        optimizers = Optimizers(model, TrainingConfig(optimizer="muon"))
        cut = {n: p for n, p in model.named_parameters() if p.ndim == 2 and ("attention" in n or "mlp" in n)}
        assert cut
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for name, p in cut.items():
            kept = rest(name, p.grad).clone()
            p.grad.mul_(factor)
            rest(name, p.grad).copy_(kept)
        optimizers.step()
        results.append({name: rest(name, p.detach()) for name, p in cut.items()})
    for name, part in results[0].items():
        assert torch.equal(part, results[1][name]), name


@pytest.mark.parametrize("size", [16, 24, 64, 128])
@pytest.mark.parametrize("columns", [False, True])
def test_rows_of_muons_update_have_a_mean_square_norm_of_one_however_the_weight_is_cut(size, columns, monkeypatch):
    monkeypatch.setattr(orthogonal_module, "matmul_dtype", lambda device: torch.float32)
    for shape in ((32, 100), (100, 32), (64, 64)):
        for blocks in (None, optimizer_module.Blocks(size, columns)):
            factor, scale = optimizer_module._factor(torch.randn(shape), blocks)
            assert factor.shape == shape
            # The iteration leaves singular values between 0.7 and 1.2.
            assert 0.7 < scale * factor.square().sum(1).mean().sqrt() < 1.2


LAYOUTS = {
    "as it comes": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", LAYOUTS)
def test_adamw_steps_along_the_gradient_however_both_lie_in_memory(parameter, gradient):
    value, grads = torch.randn(8, 12), [torch.randn(8, 12) for _ in range(3)]
    stepped = []
    for lay_p, lay_grad in ((LAYOUTS[parameter], LAYOUTS[gradient]), (LAYOUTS["as it comes"],) * 2):
        p = torch.nn.Parameter(lay_p(value.clone()))
        optimizer = AdamW([dict(params=[p], lr=0.1, weight_decay=0.1)], (0.9, 0.95))
        for grad in grads:
            p.grad = lay_grad(grad)
            optimizer.step()
        stepped.append(p.detach())
    torch.testing.assert_close(*stepped)


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


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 8, 8)])
def test_the_orthogonal_factor_is_that_of_the_matrix_at_any_scale(shape):
    matrix = torch.randn(shape)
    # A power of 2: only the norm that is divided by can make a difference.
    assert torch.equal(orthogonal(matrix * 2.0**-20), orthogonal(matrix))
    assert not orthogonal(torch.zeros(shape)).any()
