"""A setting that has no effect beside the others is named where it is asked for, and left out where a run is kept."""

import dataclasses

import pytest
import torch
from cells import SHAPE
from prose import prose

from fastllm.cli import main
from fastllm.commands import train as command
from fastllm.config import InputError, defaults_for, to_toml
from fastllm.data import Tokenizer
from fastllm.models import PRESETS, ModelConfig, build_model
from fastllm.training import RunConfig, TrainingConfig, build_run_config, read_run_config
from fastllm.training.objectives import ObjectiveConfig, fit_model
from fastllm.training.recipes import RECIPES
from fastllm.training.run import fixed_settings
from fastllm.training.setup import with_pretrained

BASE = ModelConfig(vocab_size=40, context_length=8, num_layers=2, num_heads=4, hidden_size=16, relative_buckets=8,
                   relative_distance=5)  # fmt: skip
ENCODER = {"decoder": "none", "segments": 2}
SHAPES = {
    "decoder": {}, "rotary decoder": {"positions": "rotary"}, "relative decoder": {"positions": "relative"},
    "recurrent decoder": {"decoder": "lstm"}, "masked words": {**ENCODER, "encoder": "transformer", "heads": ("mlm",)},
    "classifier": {**ENCODER, "encoder": "conv", "heads": ("classify",)},
    "layers of the encoder": {**ENCODER, "encoder": "transformer", "heads": ("nsp",), "num_encoder_layers": 1},
    "answers": {**ENCODER, "encoder": "gru", "heads": ("span",)},
    "translation": {"encoder": "transformer", "decoder": "lstm"},
    "recurrent translation": {"encoder": "gru", "decoder": "gru"},
}  # fmt: skip
# Another value of each field that every shape can have, but for its parts, its vocabulary and its classes.
OTHERS = {
    "num_layers": 3, "num_encoder_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_size": 6,
    "intermediate_size": 24, "positions": "sinusoidal", "rotary_base": 10.0, "relative_buckets": 4,
    "relative_distance": 8, "scale_embeddings": True, "norm": "rms", "norm_position": "post", "norm_eps": 0.1,
    "embedding_norm": True, "qk_norm": True, "scale_attention": False, "activation": "relu", "bias": False,
    "tie_embeddings": False, "logit_scale": 0.5, "dropout": 0.5, "zero_init": True, "pooling": "mean",
}  # fmt: skip


def function_of(config: ModelConfig) -> tuple:
    """What a model of this shape is: its parameters at their beginning, and what moved ones compute in training."""
    torch.manual_seed(0)
    model = build_model(config)
    begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.3)
    tokens, lengths = torch.randint(0, config.vocab_size, (2, 8), generator=source), torch.tensor([8, 5])
    if config.decoder != "none":
        memory = () if config.encoder == "none" else (model.encode(tokens, lengths),)
        return begin, [model(tokens, *memory)]
    encoded = model.encode(tokens, lengths, tokens % 2)
    heads = {
        "mlm": lambda: [model.masked_logits(encoded.states)], "nsp": lambda: [model.next_logits(encoded)],
        "classify": lambda: [model.class_logits(encoded)], "span": lambda: model.span_logits(encoded),
    }  # fmt: skip
    return begin, [logits for name in config.heads for logits in heads[name]()]


def same(one: tuple, other: tuple) -> bool:
    tensors = [(*begin.values(), *outputs) for begin, outputs in (one, other)]
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_names_the_fields_that_it_does_not_read(name):
    config = BASE.replace(**SHAPES[name])
    was, idle = function_of(config), set()
    for field, value in OTHERS.items():
        assert getattr(config, field) != value
        if same(was, function_of(config.replace(**{field: value}))):
            idle.add(field)
    assert idle == set(config.unused())
    assert same(was, function_of(defaults_for(config, config.unused())))


@pytest.mark.parametrize("field", ["num_heads", "num_kv_heads"])
def test_a_model_without_attention_needs_no_heads_that_fit(field):
    assert ModelConfig(decoder="gru", hidden_size=26, **{field: 5}).hidden_size == 26
    with pytest.raises(ValueError, match=f"{field}: expected a divisor"):
        ModelConfig(hidden_size=26 if field == "num_heads" else 24, **{field: 5})


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """The runs that the command began, in a folder with a file of settings and one of tokens."""
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(command, "train", lambda *args, **kwargs: begun.append(args))
    (tmp_path / "file.toml").write_text('[training]\noptimizer = "adamw"\nmuon_lr = 0.5\n')
    (tmp_path / "a.txt").write_text(prose(40))
    assert main(["tokenizer", "train", "a.txt", "--out", "t", "--vocab-size", "270", "--quiet"]) == 0
    assert main(["tokenizer", "encode", "a.txt", "--out", "tokens", "--tokenizer", "t", "--quiet"]) == 0
    return begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decoder", "lstm", "--num-heads", "4"], "num_heads has no effect: the model has no attention"),
        (["--decoder", "gru", "--positions", "rotary"], "positions has no effect: no part of the model is a Transf"),
        (["--rotary-base", "10", "--positions", "learned"], "rotary_base has no effect: positions are learned, not"),
        (["--num-encoder-layers", "2"], "num_encoder_layers has no effect: the model has no encoder"),
        (["--pooling", "mean"], "pooling has no effect: no head of the model reads a whole text"),
        (["--optimizer", "adamw", "--muon-lr", "0.02"], "muon_lr has no effect: the optimizer is adamw, not muon"),
        (["--decay", "0.3"], "decay has no effect: the schedule is linear, not wsd"),
        (["--eval-interval", "0", "--eval-windows", "9"], "eval_windows has no effect: there is no evaluation during"),
        (["--mask-probability", "0.15"], "mask_probability has no effect: is for objective mlm and mlm+nsp, not for"),
        (["--tokenizer-kind", "bpe"], "tokenizer_kind has no effect: is for tasks"),
        (["--objective", "classify", "--no-deduplicate"], "deduplicate has no effect: examples have no paragraphs"),
        (["--objective", "classify", "--labels", "a", "b"], "labels has no effect: training takes them from"),
        (["--objective", "classify", "--logit-scale", "2"], "logit_scale has no effect: the model predicts no tokens"),
        (["--objective", "classify", "--tokenizer", "t.json", "--tokenizer-kind", "char"], "the tokenizer is given"),
        (["--data", "tokens", "--no-deduplicate"], "deduplicate has no effect: tokens was prepared"),
        (["--config", "file.toml"], "file.toml: muon_lr has no effect: the optimizer is adamw, not muon"),
    ],
)
def test_the_command_names_what_has_no_effect(at_work, capsys, arguments, message):
    with pytest.raises(AttributeError, match="signal"):
        main(["train", *arguments])
    assert at_work
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-smoothing", "0.1"], "label_smoothing: is for objective seq2seq and classify, not for causal"),
        (["--objective", "mlm", "--heads", "nsp"], "heads: objective mlm needs mlm, got nsp"),
        (["--heads", "mlm"], "heads: objective causal needs none, got mlm"),
        (["--objective", "mlm+nsp", "--segments", "0"], "segments: objective mlm+nsp needs at least 2, got 0"),
        (["--objective", "nsp", "--segments", "1"], "segments: objective nsp needs at least 2, got 1"),
        (["--keep-best", "1", "--eval-interval", "0"], "keep_best: needs evaluations (eval_interval) and checkpoints"),
        (["--data", "tokens", "--vocab-size", "500"], "270 tokens do not match vocab_size 500"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(at_work, capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    assert not at_work
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-near-duplicates", "--similarity", "0.75"], "similarity has no effect: near duplicates are kept"),
        (["--language-probability", "0.9"], "language_probability has no effect: no language is asked for"),
        (["--quality-share", "0.9"], "quality_share has no effect: there is no quality_reference"),
        (["--min-doc-words", "9"], "min_doc_words has no effect: no passages are removed"),
        (["--format", "html", "--text-field", "text"], "text_field has no effect: the files are html, not JSON lines"),
    ],
)
def test_preparing_names_what_has_no_effect(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(prose(9))
    assert main(["prepare", "a.txt", "--out", "out", "--workers", "0", *arguments]) in (0, 2)
    assert message in capsys.readouterr().err


def test_masked_words_alone_may_have_no_segments():
    objective = ObjectiveConfig("mlm")
    assert fit_model(objective, SHAPE).segments == 2
    assert fit_model(objective, SHAPE, ("segments",)).segments == 0


def test_a_runs_settings_are_kept_without_those_that_have_no_effect(tmp_path, monkeypatch):
    config = build_run_config(
        {"model": {"decoder": "lstm"}, "training": {"optimizer": "adamw", "muon_lr": 0.5}}, "here", "small"
    )
    assert config.training.muon_lr == TrainingConfig.muon_lr
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert not {"num_heads", "muon_lr", "mask_probability"} & {
        line.split(" ")[0] for line in path.read_text().split("\n")
    }
    assert read_run_config(path) == config
    # The command takes it back, and flags may change it.
    trained = []
    monkeypatch.setattr(command, "train", lambda config, *args, **kwargs: trained.append(config))
    with pytest.raises(AttributeError, match="signal"):
        main(["train", "--config", str(path), "--optimizer", "muon", "--muon-lr", "0.1"])
    assert trained[0].training == dataclasses.replace(config.training, optimizer="muon", muon_lr=0.1)


def test_a_file_of_all_settings_with_their_defaults_is_accepted(tmp_path, monkeypatch):
    """Earlier versions wrote them all."""
    (tmp_path / "all.toml").write_text(to_toml(vars(RunConfig())))
    assert "mask_probability" in (tmp_path / "all.toml").read_text()
    accepted = []
    monkeypatch.setattr(command, "train", lambda *args, **kwargs: accepted.append(args))
    with pytest.raises(AttributeError, match="signal"):
        main(["train", "--config", str(tmp_path / "all.toml")])
    assert accepted


@pytest.mark.parametrize(
    ("objective", "meant"),
    [("causal", {"short_windows": 0.0}), ("mlm", {}), ("classify", {}), ("seq2seq", {"label_smoothing": 0.1})],
)
def test_the_settings_that_0_2_0_wrote_for_every_objective_are_read(tmp_path, objective, meant):
    path = tmp_path / "config.toml"
    path.write_text(
        f'[objective]\nobjective = "{objective}"\nmask_probability = 0.15\nwhole_word = true\n'
        'label_smoothing = 0.1\nlora_rank = 0\ntokenizer_kind = "bpe"\n'
    )
    assert read_run_config(path).objective == ObjectiveConfig(objective, **meant)
    for beside in ("", "mask_probability = 0.15\n"):  # which today's file may hold
        path.write_text(f'[objective]\nobjective = "causal"\nlabel_smoothing = 0.1\n{beside}')
        with pytest.raises(InputError, match="label_smoothing: is for objective seq2seq and classify, not for causal"):
            read_run_config(path)


def test_presets_and_recipes_have_no_setting_without_an_effect():
    defaults = (ModelConfig(), TrainingConfig())
    for name in (*PRESETS, *RECIPES):
        config = build_run_config({}, "here", name)
        recipe = RECIPES.get(name)
        given = (
            (PRESETS[name], TrainingConfig()) if recipe is None else (recipe.model, TrainingConfig(**recipe.training))
        )
        for part, default, unused in zip(
            given, defaults, (config.model.unused(), config.training.unused()), strict=True
        ):
            assert {field: getattr(part, field) for field in unused} == {f: getattr(default, f) for f in unused}


def test_settings_that_have_no_effect_do_not_keep_a_run_from_going_on():
    one, other = (TrainingConfig(optimizer="adamw", muon_lr=lr) for lr in (0.1, 0.2))
    assert fixed_settings(one) == fixed_settings(other)
    with pytest.raises(InputError, match="keep_best: needs"):
        TrainingConfig(keep_best=1, checkpoint_interval=0)


def test_a_run_from_a_pretrained_model_has_a_config_that_the_command_takes_back(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    tokenizer = Tokenizer.train([prose(20)], 270)
    build_model(SHAPE.replace(vocab_size=270, decoder="lstm")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = with_pretrained(build_run_config({"objective": {"pretrained": str(folder)}}, "here"))
    path, accepted = tmp_path / "config.toml", []
    path.write_text(run.without_unused().to_toml())
    monkeypatch.setattr(command, "train", lambda *args, **kwargs: accepted.append(args))
    with pytest.raises(AttributeError, match="signal"):
        main(["train", "--config", str(path)])
    assert accepted
    path.write_text(path.read_text().replace("hidden_size = 16", "hidden_size = 32"))
    assert main(["train", "--config", str(path)]) == 2
    assert "hidden_size: the model's shape comes from --pretrained" in capsys.readouterr().err
