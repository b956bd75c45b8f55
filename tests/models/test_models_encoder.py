"""Encoders and encoder-decoders: packed as padded, cached as uncached, transformers' logits, every backend the same."""

import itertools

import pytest
import torch
from conftest import DEVICE

import fastllm
from fastllm.models import Encoder, EncoderDecoder, ModelConfig, build_model, load_model
from fastllm.models.blocks import relative_bucket
from fastllm.models.from_bert import bert_config, bert_weights
from fastllm.models.from_t5 import t5_config, t5_weights

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

KINDS = ("transformer", "lstm", "gru")
ENCODERS = (*KINDS, "conv")
SHAPE = dict(vocab_size=41, context_length=16, num_layers=2, num_heads=2, hidden_size=16)
BERT = dict(segments=2, norm_position="post", embedding_norm=True, activation="gelu")
MODERN = dict(positions="rotary", activation="geglu", norm="rms", bias=False, qk_norm=True)
T5 = dict(positions="relative", norm="rms", activation="relu", bias=False, scale_attention=False)
MARIAN = dict(positions="sinusoidal", scale_embeddings=True, activation="relu", norm_position="post")
STYLES = {"bert": BERT, "modern": MODERN, "t5": T5, "marian": MARIAN}
ALL_HEADS = ("mlm", "nsp", "classify", "span")


def encoder(kind="transformer", heads=ALL_HEADS, **changes):
    config = ModelConfig(**{**SHAPE, "encoder": kind, "decoder": "none", "heads": heads, **changes})
    return Encoder(config).to(DEVICE)


def ragged():
    lengths = torch.tensor([11, 4, 1], device=DEVICE)
    tokens, segments = torch.randint(41, (3, 11), device=DEVICE), torch.randint(2, (3, 11), device=DEVICE)
    return tokens, lengths, segments


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("decoder", ["none", "transformer", "gru"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_longer_text_costs_a_token_more_by_self_attention_alone(kind, decoder):
    with torch.device("meta"):
        model = build_model(ModelConfig(**{**SHAPE, "num_encoder_layers": 4}, encoder=kind, decoder=decoder))
    layers = 4 * (kind == "transformer") + SHAPE["num_layers"] * (decoder == "transformer")
    more = 12 * layers * SHAPE["hidden_size"] * 8
    # With a decoder a token passes through one of the two.
    assert model.flops_per_token(16) - model.flops_per_token(8) == (more if decoder == "none" else more // 2)


@pytest.mark.parametrize("style", STYLES)
def test_a_packed_batch_gives_the_padded_ones_states_and_gradients(style):
    model = encoder(**STYLES[style])
    tokens, lengths, segments = ragged()
    results = []
    for packed in (False, True):
        model.zero_grad()
        model.encoder.packed = packed
        states, mask = model.encode(tokens, lengths, segments)
        (states * torch.arange(1.0, states.numel() + 1, device=DEVICE).view_as(states).cos()).sum().backward()
        results.append([states.detach(), *(p.grad.clone() for p in model.encoder.parameters())])
        assert not states[~mask].any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_convolution_sees_two_tokens_before_and_one_behind():
    """Its filters see 2, 3 and 4 tokens; one of an even number has more of them before its own than behind."""
    model = encoder("conv", num_layers=1)
    tokens = torch.arange(9, device=DEVICE)[None]
    states, _ = model.encode(tokens, torch.tensor([9], device=DEVICE))
    weight = model.encoder.token_embedding.weight
    (gradient,) = torch.autograd.grad((states[0, 4] * torch.randn(16, device=DEVICE)).sum(), weight)
    assert gradient.any(-1).nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_and_neighbours_change_nothing(kind):
    model = encoder(kind).eval()
    tokens, lengths, segments = ragged()
    states, _ = model.encode(tokens, lengths, segments)
    other = torch.where(torch.arange(11, device=DEVICE) < lengths[:, None], tokens, 3)
    torch.testing.assert_close(model.encode(other, lengths, segments)[0], states)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model.encode(tokens[row : row + 1, :length], None, segments[row : row + 1, :length])
        torch.testing.assert_close(alone[0], states[row, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ENCODERS, KINDS)))
def test_any_encoder_feeds_any_decoder_and_cached_decoding_equals_uncached(first, second):
    model = build_model(ModelConfig(**SHAPE, encoder=first, decoder=second)).to(DEVICE).eval()
    source, lengths, _ = ragged()
    target = torch.randint(41, (3, 9), device=DEVICE)
    memory = model.encode(source, lengths)
    expected = model(target, memory)
    cache = model.new_cache(3)
    with torch.no_grad():
        parts = [model(target[:, :3], memory, cache), *(model(target[:, i : i + 1], None, cache) for i in range(3, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    # The decoder is causal, and the encoder's states matter.
    changed = target.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 41
    torch.testing.assert_close(model(changed, memory)[:, :5], expected[:, :5], rtol=1e-5, atol=1e-6)
    source[0, 0] = (source[0, 0] + 1) % 41
    assert not torch.allclose(model(target, model.encode(source, lengths))[0], expected[0])


@pytest.mark.parametrize("style", ["t5", "marian", "modern"])
def test_cached_decoding_equals_uncached_in_every_style(style):
    model = build_model(ModelConfig(**SHAPE, encoder="transformer", decoder="transformer", **STYLES[style]))
    model = model.to(DEVICE).eval()
    source, lengths, _ = ragged()
    target = torch.randint(41, (3, 9), device=DEVICE)
    memory, cache = model.encode(source, lengths), model.new_cache(3)
    with torch.no_grad():
        parts = [model(part, memory if i == 0 else None, cache) for i, part in enumerate(target.split((1, 4, 3, 1), 1))]
    torch.testing.assert_close(torch.cat(parts, 1), model(target, memory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_a_cache_goes_on_with_the_sequences_selected(kind):
    model = build_model(ModelConfig(**SHAPE, encoder="gru", decoder=kind)).to(DEVICE).eval()
    source, lengths, _ = ragged()
    target = torch.randint(41, (3, 6), device=DEVICE)
    index = torch.tensor([2, 0, 0, 1], device=DEVICE)
    cache = model.new_cache(3)
    memory = model.encode(source, lengths)
    with torch.no_grad():
        model(target[:, :4], memory, cache)
        cache.select(index)
        logits = model(target[index, 4:5], None, cache)
    torch.testing.assert_close(logits[:, 0], model(target, memory)[index, 4], rtol=1e-4, atol=1e-5)


def test_a_prefix_is_read_in_both_directions():
    model = build_model(ModelConfig(**SHAPE)).to(DEVICE).eval()
    tokens, prefix = torch.randint(41, (2, 9), device=DEVICE), torch.tensor([4, 1], device=DEVICE)
    logits = model(tokens, prefix=prefix)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 41
    moved = (model(changed, prefix=prefix) - logits).abs().amax(-1) > 1e-6
    assert moved[0].all()
    assert moved[1].tolist() == [False] * 3 + [True] * 6
    cache = model.new_cache(2)
    same = torch.tensor([4, 4], device=DEVICE)
    with torch.no_grad():
        parts = [model(tokens[:, :4], cache, same), model(tokens[:, 4:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens, prefix=same), rtol=1e-4, atol=1e-5)


def test_tokens_are_scaled_and_the_papers_sinusoids_added():
    """Vaswani et al. 2017, 3.4 and 3.5; the sines come first, as Marian has them."""
    model = encoder(**MARIAN).eval()
    tokens = torch.randint(41, (2, 11), device=DEVICE)
    place = torch.arange(11.0, dtype=torch.float64)
    angles = torch.stack([place / 10000 ** (2 * i / 16) for i in range(8)], 1)
    weight = model.encoder.token_embedding.weight
    expected = 4.0 * weight[tokens].double() + torch.cat([angles.sin(), angles.cos()], 1).to(DEVICE)
    torch.testing.assert_close(model.encoder.embed(tokens).double(), expected, rtol=1e-6, atol=2e-6)
    # The scaled embeddings have a deviation of 1, within four of the deviation of 656 numbers' own.
    assert (4.0 * weight).std().item() == pytest.approx(1.0, abs=4 / (2 * 656) ** 0.5)


def test_masked_rows_alone_reach_the_vocabulary():
    model = encoder(**BERT, logit_scale=0.5).eval()
    tokens, lengths, segments = ragged()
    encoded = model.encode(tokens, lengths, segments)
    positions = torch.tensor([[1, 5, 0], [2, 0, 0], [0, 0, 0]], device=DEVICE)
    targets = torch.tensor([[7, 40, -100], [3, -100, -100], [-100, -100, -100]], device=DEVICE)
    rows = []
    hook = model.masked.head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape))
    loss = model.masked_loss(encoded, positions, targets)
    hook.remove()
    assert rows == [(3, 3, 16)]
    logits = model.masked_logits(encoded.states)
    torch.testing.assert_close(logits, 0.5 * model.masked.head(model.masked(encoded.states)))
    expected = torch.nn.functional.cross_entropy(
        torch.stack([logits[0, 1], logits[0, 5], logits[1, 2]]), torch.tensor([7, 40, 3], device=DEVICE)
    )
    torch.testing.assert_close(loss, expected)


def shaken(model):
    """Weights away from their start, so that norms and biases matter."""
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def test_bert_logits_equal_transformers():
    from transformers import BertConfig, BertForPreTraining

    sizes = dict(
        vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16,
    )  # fmt: skip
    theirs = shaken(BertForPreTraining(BertConfig(**sizes)))
    weights = theirs.state_dict()
    config = bert_config(theirs.config.to_dict(), weights)
    assert config.heads == ("mlm", "nsp")
    ours = Encoder(config).eval()
    missing, unexpected = ours.load_state_dict(bert_weights(weights, config), strict=False)
    assert (missing, unexpected) == (["masked.head.weight"], [])  # which is the token embedding
    tokens, lengths, segments = (t.cpu() for t in ragged())
    mask = torch.arange(11) < lengths[:, None]
    expected = theirs(tokens, attention_mask=mask.long(), token_type_ids=segments)
    for packed in (False, True):
        ours.encoder.packed = packed
        encoded = ours.encode(tokens, lengths, segments)
        logits = ours.masked_logits(encoded.states)
        torch.testing.assert_close(logits[mask], expected.prediction_logits[mask], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(ours.next_logits(encoded), expected.seq_relationship_logits, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is missing"):
        bert_weights({"bert.pooler.dense.bias": weights["bert.pooler.dense.bias"]}, config)
    with pytest.raises(ValueError, match="hidden_act: expected one of gelu"):
        bert_config({**theirs.config.to_dict(), "hidden_act": "swish"}, weights)


@pytest.mark.parametrize(("projection", "tied"), [("relu", True), ("gated-gelu", False)])
def test_t5_logits_equal_transformers(projection, tied):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(
        vocab_size=41, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=3,
        feed_forward_proj=projection, tie_word_embeddings=tied, relative_attention_num_buckets=8,
        relative_attention_max_distance=7,
    )  # fmt: skip
    theirs = shaken(T5ForConditionalGeneration(T5Config(**sizes)))
    weights = theirs.state_dict()
    config = t5_config(theirs.config.to_dict(), weights)
    ours = EncoderDecoder(config).eval()
    missing, unexpected = ours.load_state_dict(t5_weights(weights, config), strict=False)
    assert set(missing) <= {"head.weight", "decoder.token_embedding.weight"}
    assert not unexpected
    tokens, lengths, _ = (t.cpu() for t in ragged())
    target = torch.randint(41, (3, 9))
    mask = (torch.arange(11) < lengths[:, None]).long()
    expected = theirs(input_ids=tokens, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(ours(target, ours.encode(tokens, lengths)), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="feed_forward_proj: expected one of relu"):
        t5_config({**theirs.config.to_dict(), "feed_forward_proj": "gated-relu"}, weights)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize("causal", [False, True])
def test_relative_buckets_are_t5s(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, not causal, 32, 128)
    assert torch.equal(relative_bucket(distance, 32, 128, causal), expected)


@pytest.mark.parametrize("shape", ["bert", "modern", "t5", "lstm"])
def test_a_step_is_the_same_on_eager_and_on_the_kernels(shape):
    kinds = dict(encoder="lstm", decoder="lstm") if shape == "lstm" else dict(encoder="transformer")
    task = shape in ("bert", "modern")
    config = ModelConfig(**{**SHAPE, **STYLES.get(shape, {}), **kinds, **({"decoder": "none"} if task else {})})
    model = build_model(config.replace(heads=ALL_HEADS) if task else config).to(DEVICE)
    tokens, lengths, segments = ragged()
    targets = torch.randint(41, (3, 6), device=DEVICE)
    results = {}
    for backend in ("eager", "triton"):
        model.zero_grad()
        with fastllm.backend(backend):
            if task:
                encoded = model.encode(tokens, lengths, segments if config.segments else None)
                loss = model.masked_loss(encoded, tokens[:, :2] % lengths[:, None], targets[:, :2])
                loss = loss + model.next_logits(encoded).square().mean() + model.class_logits(encoded).sin().mean()
            else:
                loss = model.loss(tokens, lengths, targets, targets.flip(1), label_smoothing=0.1)
            loss.backward()
        results[backend] = [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    for a, b in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-4, atol=3e-6)


@pytest.mark.parametrize("kinds", [("transformer", "none"), ("gru", "none"), ("lstm", "transformer"), ("none", "gru")])
def test_save_and_load_whichever_it_is(kinds, tmp_path):
    heads = ("classify",) if kinds[1] == "none" else ()
    config = ModelConfig(**SHAPE, encoder=kinds[0], decoder=kinds[1], heads=heads, labels=("a", "b", "c"))
    model = build_model(config).to(DEVICE)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device=DEVICE)
    assert type(loaded) is type(model)
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    (tmp_path / "config.json").write_text('{"architecture": "Perceptron"}')
    with pytest.raises(ValueError, match="expected one of Transformer, RNN, Encoder, EncoderDecoder; got 'Perceptron'"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_activation_checkpointing_changes_nothing(kind):
    model = build_model(ModelConfig(**SHAPE, encoder=kind, decoder=kind)).to(DEVICE)
    tokens, lengths, _ = ragged()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.checkpoint_activations = recompute
        model.loss(tokens, lengths, tokens, tokens.flip(1)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "none", "decoder": "none"}, "decoder: expected one where there is no encoder"),
        ({"heads": ("mlm",)}, "heads: expected none for a model with a decoder"),
        ({"heads": ("mlm", "tail"), "encoder": "gru", "decoder": "none"}, "heads: expected one of mlm"),
        ({"encoder": "cnn"}, "encoder: expected one of none, transformer, lstm, gru"),
        ({"relative_buckets": 6}, "relative_buckets: expected a multiple of 4"),
        ({"encoder": "gru", "hidden_size": 15, "num_heads": 3}, "hidden_size: expected an even number"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **changes})


def test_models_refuse_what_they_lack():
    model = encoder(heads=("mlm",))
    encoded = model.encode(ragged()[0])
    with pytest.raises(ValueError, match="this encoder has no head for that"):
        model.span_logits(encoded)
    with pytest.raises(ValueError, match="needs the encoder's states"):
        build_model(ModelConfig(**SHAPE, encoder="gru")).to(DEVICE)(ragged()[0])
    with pytest.raises(ValueError, match="lengths must be"):
        encoder().encode(ragged()[0], torch.tensor([1], device=DEVICE))


@pytest.mark.parametrize("kind", ENCODERS)
def test_lengths_are_checked_and_nothing_has_a_state(kind):
    model = encoder(kind).eval()
    tokens, lengths, _ = ragged()
    for wrong, error in ((lengths.double(), TypeError), (lengths.tolist(), TypeError), (lengths + 1, ValueError)):
        if error is TypeError or lengths.device.type == "cpu":
            with pytest.raises(error, match="lengths must be"):
                model.encode(tokens, wrong)
    with pytest.raises(TypeError, match="tokens must be a tensor, got list"):
        model.encode(tokens.tolist())
    for packed in (False, True) if kind == "transformer" else (None,):
        model.encoder.packed = packed
        assert model.class_logits(model.encode(tokens[:0], lengths[:0])).shape == (0, 2)
    if kind in KINDS:
        decoder = build_model(ModelConfig(**SHAPE, decoder=kind)).to(DEVICE).eval()
        assert decoder(tokens[:0]).shape == (0, 11, 41)
    for pooling in ("mean", "max"):
        model = encoder(kind, pooling=pooling).eval()
        encoded = model.encode(tokens, lengths * torch.tensor([1, 0, 1], device=DEVICE))
        assert model.class_logits(encoded).isfinite().all()
