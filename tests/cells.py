"""Every objective on every model that serves it, tiny: the cells of the table in docs/tour.md."""

import random
from functools import cache

import torch

from fastllm.config import InputError
from fastllm.data import Corpus, Tokenizer, prepare
from fastllm.models import ModelConfig, build_model
from fastllm.tasks.prompts import rendered
from fastllm.tasks.store import prepare_examples, split_examples, texts
from fastllm.training.config import TrainingConfig
from fastllm.training.objectives import OBJECTIVES, ObjectiveConfig, fit_model, make_objective
from fastllm.training.optimizer import Optimizers
from fastllm.training.step import StepSettings, train_step

WORDS = [
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "house",
    "sees",
    "likes",
    "big",
    "small",
    "tree",
    "runs",
    "over",
    "under",
    "the",
]
SHAPE = ModelConfig(vocab_size=300, context_length=32, num_layers=1, num_heads=2, hidden_size=16, positions="rotary")
STEPS = 12
# Reads with, writes with. A recurrent decoder cannot see a prefix in both directions.
KINDS = ("transformer", "lstm", "gru")
ENCODERS = (*KINDS, "conv")


def sentence(source: random.Random, length: int = 5) -> str:
    return " ".join(source.choice(WORDS) for _ in range(length))


def document(source: random.Random) -> str:
    return " ".join(sentence(source).capitalize() + "." for _ in range(12))


def examples(objective: str) -> list[dict]:
    source = random.Random(1)
    made = []
    for number in range(40):
        text = sentence(source)
        if objective == "seq2seq":
            made.append({"source": text, "target": " ".join(reversed(text.split())).upper()})
        elif objective == "classify":
            label = ("bad", "good")[number % 2]
            made.append({"text": f"{text} {label} {sentence(source, 2)}", "label": label})
        elif objective == "instruct":
            made.append({"prompt": f"{text} =", "answer": f" {text.split()[0]}"})
        elif objective == "dpo":
            made.append({"prompt": text, "chosen": f" {sentence(source, 3)}.", "rejected": f" {sentence(source, 3)}!"})
        else:
            context = f"{text} the key is K{number}. {sentence(source)}"
            answer = {"text": f"K{number}", "start": context.index(f"K{number}")}
            made.append({"id": str(number), "question": "which key?", "context": context, "answers": [answer]})
    return made


@cache
def dataset(objective: str, folder):
    kind = OBJECTIVES[objective]
    config = config_for(objective, folder)
    if kind.task:
        train, validation = split_examples(examples(objective))
        tokenizer = Tokenizer.train(texts(train), 300, special_tokens=config.special_tokens)
        if kind.asks:
            train, validation = ([rendered(e, tokenizer) for e in part] for part in (train, validation))
        if objective == "dpo":
            even = {"reference": {"chosen": -20.0, "rejected": -20.0}}
            train, validation = ([{**e, **even} for e in part] for part in (train, validation))
        return prepare_examples(folder / objective, objective, "toy", train, validation, tokenizer)
    source = random.Random(0)
    corpus = Corpus("toy", [document(source) for _ in range(6)], [document(source) for _ in range(2)])
    return prepare(corpus, folder / objective, vocab_size=300, special_tokens=config.special_tokens)


def config_for(objective: str, folder) -> ObjectiveConfig:
    """The settings of an objective, with a teacher in ``folder`` where it needs one."""
    if objective == "dpo":
        return ObjectiveConfig("dpo", pretrained=str(folder))
    if objective != "distill":
        return ObjectiveConfig(objective)
    teacher = folder / "teacher"
    if not teacher.exists():
        data, state = dataset("causal", folder), torch.get_rng_state()
        torch.manual_seed(1)
        build_model(SHAPE.replace(vocab_size=data.tokenizer.vocab_size)).save_pretrained(teacher)
        torch.set_rng_state(state)
        data.tokenizer.save_pretrained(teacher)
    return ObjectiveConfig("distill", teacher=str(teacher))


def cells() -> list[tuple[str, str, str]]:
    """(objective, encoder, decoder), "none" for a part that the objective has no use for."""
    found = []
    for name, kind in OBJECTIVES.items():
        for encoder in ENCODERS if kind.encoder else ("none",):
            for decoder in KINDS if kind.decoder else ("none",):
                needs = {"dpo": {"pretrained": "x"}, "distill": {"teacher": "x"}}.get(name, {})
                try:
                    fit_model(
                        ObjectiveConfig(name, **needs), SHAPE.replace(encoder=encoder, decoder=decoder), ("decoder",)
                    )
                except InputError:
                    continue
                found.append((name, encoder, decoder))
    return found


def setting(name: str, encoder: str, decoder: str, folder):
    """The objective on a toy, and a model for it."""
    torch.manual_seed(0)
    config, data = config_for(name, folder), dataset(name, folder)
    shape = fit_model(config, SHAPE.replace(encoder=encoder, decoder=decoder))
    labels = data.labels if name == "classify" else ()
    model = build_model(shape.replace(vocab_size=data.tokenizer.vocab_size, labels=labels))
    return make_objective(config, data, SHAPE.context_length, 4, 0), model


def tiny_run(name: str, encoder: str, decoder: str, folder) -> tuple[float, float]:
    """The loss of a batch before and after :data:`STEPS` steps on it."""
    objective, model = setting(name, encoder, decoder, folder)
    optimizers = Optimizers(model, TrainingConfig(optimizer="adamw", lr=1e-2))
    batch, losses = objective.batch(0), []
    for _ in range(STEPS):
        loss, _, _ = train_step(objective, model, optimizers, batch, StepSettings(2, 1.0, "float32"))
        losses.append(loss.item())
    return losses[0], losses[-1]
