"""The Transformer: its shapes, its cache, its files, and the same step on every backend."""

import dataclasses
import json

import pytest
import torch
from conftest import DEVICE, HAS_GPU

import fastllm
from fastllm.generate.sampling import filter_logits, generate
from fastllm.models import PRESETS, RNN, Transformer, TransformerConfig, load_model

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

GPT2_SHAPE = TransformerConfig(vocab_size=61, context_length=24, num_layers=2, num_heads=3, hidden_size=24)
LLAMA_SHAPE = TransformerConfig(
    vocab_size=61, context_length=24, num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, positions="rotary",
    norm="rms", activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
TINY_SHAPE = PRESETS["tiny"].replace(
    vocab_size=61, context_length=24, num_heads=2, hidden_size=32, dropout=0.0, zero_init=False
)
SHAPES = {"gpt2": GPT2_SHAPE, "llama": LLAMA_SHAPE, "tiny": TINY_SHAPE}


@pytest.fixture(params=SHAPES)
def model(request):
    return Transformer(SHAPES[request.param]).to(DEVICE)


def tokens(batch=2, length=11):
    return torch.randint(61, (batch, length), device=DEVICE)


@pytest.mark.runs_on("anywhere")
def test_published_parameter_counts():
    with torch.device("meta"):
        counts = {name: Transformer(PRESETS[name]).num_parameters() for name in ("gpt2", "gpt2-medium", "llama-8b")}
    assert counts == {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "llama-8b": 8_030_261_248}


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("zero_init", [False, True])
def test_weights_start_at_gpt2s_scale_and_projections_into_the_stream_below_it(zero_init):
    config = TransformerConfig(vocab_size=64, num_layers=3, num_heads=4, hidden_size=128, zero_init=zero_init)
    model = Transformer(config)
    below = 0.0 if zero_init else 0.02 / 6**0.5
    for block in model.blocks:
        for weight, std in (
            (block.attention.qkv.weight, 0.02), (block.mlp.up.weight, 0.02), (block.attention.out.weight, below),
            (block.mlp.down.weight, below),
        ):  # fmt: skip
            # 16,384 numbers and more: the deviation of their deviation is 0.6% of it.
            assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.runs_on("anywhere")
def test_flops_follow_the_stated_formula():
    with torch.device("meta"):
        model = Transformer(PRESETS["gpt2"])
    weights = 124_439_808 - 1024 * 768
    assert model.flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024


def test_is_causal(model):
    ids = tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-6)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 1, 6), (10, 1)])
def test_cached_logits_equal_uncached(model, chunks):
    ids = tokens()
    expected = model(ids)
    cache = model.new_cache(batch_size=2)
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_refuses_to_lose_gradients(model):
    with pytest.raises(RuntimeError, match="keeps no gradient"):
        model(tokens(), model.new_cache(batch_size=2))
    with pytest.raises(ValueError, match="made for 1 sequences, got 2"), torch.no_grad():
        model(tokens(), model.new_cache())


def test_loss_ignores_masked_targets(model):
    ids, targets = tokens(), tokens()
    targets[0, 3:] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss = model.loss(ids, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_nothing(model):
    ids, targets = tokens(), tokens()
    model.loss(ids, targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpoint_activations = True
    model.loss(ids, targets).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_same_on_eager_and_on_the_kernels(shape):
    torch.manual_seed(3)
    model = Transformer(SHAPES[shape]).to(DEVICE)
    ids, targets = tokens(), tokens()
    results = {}
    for backend in ("eager", "triton"):
        model.zero_grad()
        with fastllm.backend(backend):
            loss = model.loss(ids, targets)
            loss.backward()
        results[backend] = [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    names = ["loss", *[name for name, _ in model.named_parameters()]]
    for name, a, b in zip(names, results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_kernels_really_ran(monkeypatch):
    calls = []
    original = torch.ops.fastllm.norm_fwd.default.__class__.__call__

    def recorded(self, *args, **kwargs):
        calls.append(str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.ops.fastllm.norm_fwd.default.__class__, "__call__", recorded)
    with fastllm.backend("triton"):
        Transformer(LLAMA_SHAPE).to(DEVICE).loss(tokens(), tokens()).backward()
    ran = {name.split(".")[1] for name in calls if name.startswith("fastllm.")}
    # The loss's forward leaves its gradient behind; its backward only scales it.
    expected = {"norm_fwd", "norm_bwd", "attention_fwd", "attention_bwd", "cross_entropy_fwd", "cross_entropy_scale_"}
    assert expected <= ran


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = Transformer.from_pretrained(tmp_path, device=DEVICE)
    assert loaded.config == model.config
    assert not loaded.training
    ids = tokens()
    torch.testing.assert_close(loaded(ids), model.eval()(ids), rtol=0, atol=0)
    if model.config.tie_embeddings:
        assert loaded.head.weight is loaded.token_embedding.weight


@pytest.mark.runs_on("anywhere")
def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        Transformer.from_pretrained(tmp_path)
    Transformer(GPT2_SHAPE).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"depth": 3}, "unknown field of ModelConfig: depth"),
        ({"num_layers": 3}, "does not fit its config: missing"),
        ({"hidden_size": 25}, "num_heads: expected a divisor of hidden_size 25"),
        ({"architecture": "RNN"}, "describes a RNN"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(tmp_path)
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        for load in (Transformer.from_pretrained, load_model):
            with pytest.raises(ValueError, match="not a model's configuration"):
                load(tmp_path)


@pytest.mark.runs_on("anywhere")
def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    Transformer(GPT2_SHAPE).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Transformer(GPT2_SHAPE).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "num_heads: expected a divisor of hidden_size 768"),
        ({"num_kv_heads": 5}, "num_kv_heads: expected a divisor of num_heads 12"),
        ({"dropout": 1.0}, "dropout: expected less than 1"),
        ({"positions": "none"}, "positions: expected one of learned, rotary"),
        ({"num_layers": 0}, "num_layers: expected at least 1"),
        ({"hidden_size": 12, "positions": "rotary"}, "num_heads: expected an even hidden_size"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


@pytest.mark.runs_on("anywhere")
def test_every_field_has_help():
    assert all(f.metadata["help"] for f in dataclasses.fields(TransformerConfig))


def test_forward_refuses(model):
    with pytest.raises(ValueError, match="past context_length 24"):
        model(tokens(length=25))
    with pytest.raises(ValueError, match=r"tokens must be \(batch, length\)"):
        model(torch.zeros(3, 4, device=DEVICE))
    with pytest.raises(TypeError, match="targets must be a tensor, got NoneType"):
        model.loss(tokens(), None)
    if not HAS_GPU:
        with pytest.raises(IndexError):
            model(torch.full((1, 2), 61))


def test_greedy_generation_follows_the_uncached_model(model):
    prompt = tokens(1, 5)[0].tolist()
    drawn = list(generate(model, prompt, max_new_tokens=12, temperature=0.0))
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(model.eval()(torch.tensor([ids], device=DEVICE))[0, -1].argmax()))
    assert drawn == ids[5:]


@pytest.mark.parametrize("start", [3, 24, 40])
def test_a_full_context_is_followed_by_its_newer_half(model, start):
    for p in model.requires_grad_(False).parameters():
        p.mul_(3)  # so that the likeliest token depends on all that is seen
    prompt = tokens(1, start)[0].tolist()
    seen, expected = prompt[-24:], []
    for _ in range(40):
        if len(seen) > 24:
            seen = seen[-12:]
        expected.append(int(model.eval()(torch.tensor([seen], device=DEVICE))[0, -1].argmax()))
        seen.append(expected[-1])
    assert list(generate(model, prompt, max_new_tokens=40, temperature=0.0)) == expected


def test_generation_goes_on_past_the_context(model):
    drawn = list(generate(model, [1, 2, 3], max_new_tokens=60, seed=0))
    assert len(drawn) == 60
    assert all(0 <= t < 61 for t in drawn)


def test_a_seed_repeats_and_leaves_the_global_stream_alone(model):
    state = torch.get_rng_state()
    first = list(generate(model, [5], max_new_tokens=20, seed=7, top_k=20, top_p=0.9))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == list(generate(model, [5], max_new_tokens=20, seed=7, top_k=20, top_p=0.9))
    assert first != list(generate(model, [5], max_new_tokens=20, seed=8, top_k=20, top_p=0.9))
    assert model.training


def test_the_coldest_and_narrowest_draw_is_the_likeliest(model):
    likeliest = list(generate(model, [5], max_new_tokens=6, temperature=0.0))
    for options in ({"top_p": 1e-50}, {"temperature": 1e-45}, {"temperature": 1e-29}):
        assert list(generate(model, [5], max_new_tokens=6, **options)) == likeliest


def test_stop_token_ends_the_stream(model):
    drawn = list(generate(model, [5], max_new_tokens=30, seed=1))
    stopped = list(generate(model, [5], max_new_tokens=30, seed=1, stop_token=drawn[10]))
    assert stopped == drawn[: drawn.index(drawn[10])]


@pytest.mark.runs_on("anywhere")
def test_filters_keep_what_they_say():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = lambda **options: filter_logits(logits, **options).isfinite().tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False, False]
    assert kept(top_p=0.1) == [True, False, False, False, False]
    assert kept(top_p=0.86) == [True, True, True, True, False]
    assert kept(top_p=1e-50) == [True, False, False, False, False]
    assert kept() == [True] * 5
    torch.testing.assert_close(filter_logits(logits, temperature=0.5), logits * 2)
    tied = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    for k in range(1, 6):
        assert filter_logits(tied, top_k=k).isfinite().sum(-1).tolist() == [k, k]
    assert filter_logits(tied, top_k=3)[0, [1, 3]].tolist() == [2.0, 2.0]
    for option in (
        {"temperature": 0.0},
        {"temperature": 1e-45},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
            filter_logits(tied, **option)
    with pytest.raises(TypeError, match=r"top_k must be a whole number, got 2\.5"):
        filter_logits(tied, top_k=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_generate_refuses_before_any_work(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [1], **options)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [])


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "stop_token"])
def test_generate_takes_no_truth_value_for_a_number(model, name):
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got True"):
        generate(model, [1], **{name: True})


@pytest.mark.parametrize("tokens", [None, 1, "a", [None], [1.5], torch.tensor(1.5), torch.tensor([1.5])])
def test_generate_names_a_prompt_that_is_none(model, tokens):
    with pytest.raises(TypeError, match="tokens must be a sequence of token ids, got"):
        generate(model, tokens)


@pytest.mark.runs_on("anywhere")
def test_a_prefix_that_fits_no_batch_is_refused():
    model, tokens = Transformer(TINY_SHAPE), torch.zeros(2, 4, dtype=torch.long)
    for wrong, error in (
        (torch.tensor([2]), ValueError), (torch.tensor([[2], [2]]), ValueError), (torch.tensor([2.0, 2.0]), TypeError),
        ([2, 2], TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="prefix must be"):
            model(tokens, prefix=wrong)


@pytest.mark.runs_on("anywhere")
def test_a_cache_of_another_kind_of_decoder_is_refused():
    attends, recurs = Transformer(TINY_SHAPE), RNN(TINY_SHAPE.replace(decoder="gru"))
    tokens = torch.zeros(2, 4, dtype=torch.long)
    with torch.no_grad():
        with pytest.raises(TypeError, match="cache must be a KVCache, which new_cache makes, got RecurrentCache"):
            attends(tokens, cache=recurs.new_cache(2))
        with pytest.raises(TypeError, match="cache must be a RecurrentCache, which new_cache makes, got KVCache"):
            recurs(tokens, cache=attends.new_cache(2))


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("folder", [None, 3, b"folder"])
def test_what_is_no_path_is_named(folder):
    for use in load_model, Transformer.from_pretrained, Transformer(TINY_SHAPE).save_pretrained:
        with pytest.raises(TypeError, match="folder: expected a path"):
            use(folder)
