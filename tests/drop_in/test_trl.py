"""TRL's fused output layer on this library's log-probabilities: the same outputs and gradients, and given back."""

from types import SimpleNamespace

import pytest
import torch

from fastllm.drop_in import serve_trl

pytestmark = [pytest.mark.runs_on("anywhere"), pytest.mark.usefixtures("one_thread")]
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(scope="module")
def utils():
    pytest.importorskip("trl", reason="TRL is not installed (pip install trl): there is no trainer to serve")
    return pytest.importorskip("trl.trainer.utils", reason="the installed TRL has no trl.trainer.utils")


def _model(kind: str):
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=32))
    if kind == "granite":  # divides its logits
        return transformers.GraniteForCausalLM(
            transformers.GraniteConfig(**shape, intermediate_size=32, num_key_value_heads=2, logits_scaling=3.0)
        )
    config = transformers.Gemma2Config(
        **shape, intermediate_size=32, head_dim=8, num_key_value_heads=1, final_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "granite", "gemma2"])
def test_the_fused_head_gives_what_trls_gives(kind, utils):
    model, other = _model(kind), _model(kind)
    for one in (model, other):
        if kind == "llama":
            one.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        utils.add_fused_lm_head(one, temperature=0.7, outputs=FIELDS)
    tokens = torch.randint(50, (2, 7))
    labels = tokens.clone()
    labels[0, :3] = labels[1, 5:] = -100
    results = []
    theirs = model.forward
    for served in (False, True):
        if served:
            handle = serve_trl(SimpleNamespace(model=model, ref_model=None))
            assert handle.models == [model]
            assert model.forward != theirs
        model.zero_grad()
        found = model(input_ids=tokens, labels=labels, fused_lm_head=True)
        (found.log_probs.exp().sum() + 0.3 * found.entropy.square().sum()).backward()
        results.append([*(found[name] for name in FIELDS), *(p.grad for p in model.parameters())])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    plain = model(input_ids=tokens).logits
    handle.revert()
    assert model.forward == theirs
    torch.testing.assert_close(model(input_ids=tokens).logits, plain, rtol=0, atol=0)
    assert "ServedHead" not in str(vars(utils)["_ChunkedLogProbFunction"])  # another model's is TRL's own


# peft asks transformers 5 for what it has renamed.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trainer_is_served_once_with_its_reference_and_adapters(utils):
    import peft

    model, reference = _model("llama"), _model("llama")
    for one in (model, reference):
        utils.add_fused_lm_head(one)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = SimpleNamespace(model=adapted, ref_model=reference)
    with serve_trl(trainer) as handle:
        assert handle.models == [model, reference]
        assert serve_trl(trainer).models == []
        tokens = torch.randint(50, (1, 5))
        adapted(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs.sum().backward()
    assert "_fused_forward" in reference.forward.__func__.__code__.co_name
    assert serve_trl(trainer).models == [model, reference]


def test_a_model_without_trls_head_is_refused():
    with pytest.raises(TypeError, match="serve_trl: expected a trainer of TRL's whose model has its fused output"):
        serve_trl(SimpleNamespace(model=torch.nn.Linear(2, 2)))
