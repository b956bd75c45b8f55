"""Tiny random models of many architectures, with inputs that give a loss: for tests and for docs/drop_in.py."""

from __future__ import annotations

import copy
import warnings

import torch

import fastllm
from fastllm.drop_in.attention import attending_within

VOCABULARY, BATCH, LENGTH = 96, 2, 12
DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
)  # fmt: skip
MOE = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
)  # fmt: skip
ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
SEQ2SEQ = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip

TWO_TOWERS = dict(
    text_config=dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2),
    vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       image_size=16, patch_size=8),
)  # fmt: skip


def _tokens():
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def _image(**targets):
    return dict(pixel_values=torch.randn(BATCH, 3, 16, 16), **targets)


def _classes():
    return _image(labels=torch.tensor([1, 0]))


def _image_and_text():
    return _image(input_ids=torch.randint(3, VOCABULARY, (BATCH, LENGTH)), return_loss=True)


def _mel():
    return dict(input_features=torch.randn(BATCH, 8, 24), labels=torch.randint(3, VOCABULARY, (BATCH, LENGTH)))


def _waveform():
    return dict(input_values=torch.randn(BATCH, 400), labels=torch.randint(3, 20, (BATCH, 3)))


# Name -> (class, configuration class, its arguments, inputs).
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}, _tokens),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER, _tokens),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER, _tokens),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "sliding_window": 4}, _tokens),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**DECODER, "tie_word_embeddings": True}, _tokens),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER, _tokens),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER, _tokens),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**DECODER, "logits_scaling": 4.0}, _tokens),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, _tokens),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**DECODER, "hidden_dropout": 0.0}, _tokens),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, dropout=0.0, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1,
             eos_token_id=2), _tokens,
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0,
             bos_token_id=1, eos_token_id=2, pad_token_id=0), _tokens,
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}, _tokens),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**DECODER, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, _tokens,
    ),
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, _tokens,
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **MOE}, _tokens),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**DECODER, **MOE}, _tokens),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**DECODER, **MOE}, _tokens),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig",
        {**DECODER, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}, _tokens,
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**DECODER, **MOE}, _tokens),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**DECODER, **MOE}, _tokens),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**DECODER, "intermediate_size_mlp": 48, "num_local_experts": 4}, _tokens,
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**DECODER, **MOE, **LATENT}, _tokens),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**DECODER, **MOE, **LATENT}, _tokens),
    "deepseek_v4": ("DeepseekV4ForCausalLM", "DeepseekV4Config", {**DECODER, **MOE}, _tokens),
    "hy_v3": ("HYV3ForCausalLM", "HYV3Config", {**DECODER, **MOE}, _tokens),
    "hy_v4": ("HYV4ForCausalLM", "HYV4Config", {**DECODER, **MOE}, _tokens),
    "solar_open": ("SolarOpenForCausalLM", "SolarOpenConfig", {**DECODER, **MOE}, _tokens),
    "mellum": ("MellumForCausalLM", "MellumConfig", {**DECODER, **MOE}, _tokens),
    "flint": ("FlintForCausalLM", "FlintConfig", {**DECODER, **MOE}, _tokens),
    "laguna": ("LagunaForCausalLM", "LagunaConfig", {**DECODER, **MOE}, _tokens),
    "kolibri1": ("Kolibri1ForCausalLM", "Kolibri1Config", {**DECODER, **MOE}, _tokens),
    "beam": ("BeamForCausalLM", "BeamConfig", {**DECODER, **MOE}, _tokens),
    "lara_mini": ("LaraMiniForCausalLM", "LaraMiniConfig", {**DECODER, **MOE}, _tokens),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "sliding_window": 4}, _tokens),
    "gemma4": (
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        {**DECODER, "sliding_window": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        _tokens,
    ),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {**DECODER, "sliding_window": 4}, _tokens),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", DECODER, _tokens),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", DECODER, _tokens),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}, _tokens),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", DECODER, _tokens),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8),
        _tokens,
    ),
    "deberta_v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", ENCODER, _tokens),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER, _tokens),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER, _tokens),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 24}, _tokens),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 24}, _tokens),
    "modernbert": (
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**ENCODER, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        _tokens,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, _tokens),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, _tokens),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, _tokens),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
         "suppress_tokens": None, "begin_suppress_tokens": None}, _mel,
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        dict(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
             num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0,
             activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False,
             ctc_loss_reduction="mean"), _waveform,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, _classes),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, _classes),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        dict(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4,
             drop_path_rate=0.0), _classes,
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification", "ConvNextV2Config",
        dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, image_size=16), _classes,
    ),
    "clip": ("CLIPModel", "CLIPConfig", {**TWO_TOWERS, "projection_dim": 16}, _image_and_text),
    "siglip": ("SiglipModel", "SiglipConfig", TWO_TOWERS, _image_and_text),
}  # fmt: skip


def there(name: str) -> bool:
    """Whether the installed transformers has the architecture."""
    import transformers

    return hasattr(transformers, ARCHITECTURES[name][0])


def build(name: str, **changes):
    """(model in training mode without dropout, inputs whose output has a loss), the same ones on every call.

    ``changes`` override arguments of the configuration.
    """
    import transformers

    model, config, arguments, inputs = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **changes})).train()
        for parameter in model.parameters():  # norms that are all ones and biases that are all zeros hide mistakes
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, inputs()


def pair(name="llama", **options):
    """Model ``name`` accelerated with ``options``, the same model as it is, and inputs for both."""
    model, inputs = build(name)
    other = copy.deepcopy(model)
    fastllm.accelerate(model, **options)
    return model, other, inputs


def same_gradients(model, other, **tolerances):
    """Asserts that each parameter of ``model`` has the gradient of ``other``'s, or neither has one."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def attentions(model):
    """What the modules of ``model`` that attend call."""
    return {part.config._attn_implementation for part in attending_within(model)}
