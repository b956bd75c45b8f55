"""Which objective a run has: its settings, and the model that it asks for. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import Literal

from ..config import InputError, check_fields, option, settings
from ..data.tokenizer import KINDS, SPECIAL_TOKENS
from ..models.config import ModelConfig


@dataclass(frozen=True)
class ObjectiveKind:
    """What an objective needs: ``encoder`` and ``decoder`` in the model, ``heads`` on the encoder.

    ``task``: it reads examples, not a stream of text. ``tokens``: the tokenizer's special tokens, as in SPECIAL_TOKENS.
    ``asks``: its examples are prompts.
    """

    summary: str
    _: KW_ONLY
    encoder: bool = False
    decoder: bool = False
    heads: tuple[str, ...] = ()
    task: bool = False
    tokens: str = "masked"
    asks: bool = False


OBJECTIVES = {
    "causal": ObjectiveKind("the next token", decoder=True, tokens="causal"),
    "prefix": ObjectiveKind(
        "the next token, given a beginning that is read in both directions", decoder=True, tokens="causal"
    ),
    "mlm": ObjectiveKind("masked tokens", encoder=True, heads=("mlm",)),
    "nsp": ObjectiveKind("whether two texts follow each other", encoder=True, heads=("nsp",)),
    "mlm+nsp": ObjectiveKind(
        "masked tokens and whether two texts follow each other, as BERT", encoder=True, heads=("mlm", "nsp")
    ),
    "seq2seq": ObjectiveKind("a text in another language", encoder=True, decoder=True, task=True, tokens="causal"),
    "classify": ObjectiveKind("the label of a text", encoder=True, heads=("classify",), task=True),
    "answer": ObjectiveKind(
        "where in a text the answer to a question stands", encoder=True, heads=("span",), task=True
    ),
    "instruct": ObjectiveKind("the answer to a prompt", decoder=True, task=True, tokens="causal", asks=True),
    "dpo": ObjectiveKind(
        "which of two answers is preferred, by a pretrained model", decoder=True, task=True, tokens="causal", asks=True
    ),
    "distill": ObjectiveKind("the next token, as the text and a teacher have it", decoder=True, tokens="causal"),
}
# Settings of one objective, which are refused for the others.
OWN = {
    "label_smoothing": ("seq2seq", "classify"), "mask_probability": ("mlm", "mlm+nsp"),
    "whole_word": ("mlm", "mlm+nsp"), "token_dropout": ("classify",), "short_windows": ("causal",), "beta": ("dpo",),
    "dpo_loss": ("dpo",), "teacher": ("distill",), "teacher_share": ("distill",), "temperature": ("distill",),
    "direction": ("distill",), "jsd_beta": ("distill",),
}  # fmt: skip


@dataclass(frozen=True)
class ObjectiveConfig:
    """What to learn."""

    objective: str = option("causal", "what is predicted", choices=tuple(OBJECTIVES))
    mask_probability: float = option(0.15, "mlm: part of the tokens to predict", above=0, below=1)
    whole_word: bool = option(True, "mlm: mask all pieces of a word or none")
    label_smoothing: float | None = option(
        None, "probability spread over all tokens or labels; if not given 0.1 for seq2seq and 0 for classify",
        minimum=0, below=1,
    )  # fmt: skip
    token_dropout: float = option(0.0, "classify: part of a text's tokens that training masks", minimum=0, below=1)
    pretrained: str | None = option(
        None,
        "start from this run's or model's weights, shape and tokenizer; heads that it lacks are new",
        metavar="FOLDER",
    )
    lora_rank: int = option(
        0, "with --pretrained: train adapters of this rank (LoRA) and new heads, and nothing else; 0: train everything",
        minimum=0,
    )  # fmt: skip
    tokenizer_kind: str = option(
        "bpe", "tasks: the kind of the tokenizer that is trained on the examples where none is given", choices=KINDS
    )
    held_out: str | None = option(
        None,
        "a file or folder to score on, or several with commas between them; without it a tenth of the data",
        metavar="PATH",
    )

    short_windows: float | None = option(
        None, "causal: part of the run, from its beginning, whose windows are a quarter of context_length long, and "
        "four times as many; 0.5 if not given, 0 with pretrained", minimum=0, maximum=1,
    )  # fmt: skip
    beta: float = option(0.1, "dpo: how strongly the model is held to its starting point", above=0)
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = option(
        "sigmoid", "dpo: the loss of a pair; ipo's is the difference from 1 / (2 beta), squared"
    )
    teacher: str | None = option(
        None, "distill: the run or model to learn from; its tokenizer is used", metavar="FOLDER"
    )
    teacher_share: float = option(0.5, "distill: the teacher's share of the loss; the rest is the text's loss",
                                  above=0, maximum=1)  # fmt: skip
    temperature: float = option(
        1.0, "distill: divides the logits of both; the divergence is multiplied by its square", above=0
    )
    direction: str = option(
        "forward", "distill: KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence",
        choices=("forward", "reverse", "jsd"),
    )  # fmt: skip
    jsd_beta: float = option(0.5, "distill: the teacher's share of the mixture in jsd", above=0, below=1)

    def __post_init__(self):
        check_fields(self)
        for setting in settings(type(self)):
            why = self._others().get(setting.name)
            if why is not None and getattr(self, setting.name) != setting.default:
                raise InputError(f"{setting.name}: {why}")
        if self.objective == "dpo" and self.pretrained is None:
            raise InputError("pretrained: objective dpo needs a model to start from, which is its reference; name one")
        if self.objective == "distill" and self.teacher is None:
            raise InputError("teacher: objective distill needs one; name a run or a model")
        if self.lora_rank and self.pretrained is None:
            raise InputError("lora_rank: adapters are added to a pretrained model; name one with pretrained")
        if self.lora_rank and find_spec("peft") is None:
            raise InputError("lora_rank: adapters need peft: pip install 'fastllm[lora]'")
        if self.tokenizer_kind != "bpe" and not OBJECTIVES[self.objective].task:
            raise InputError(f"tokenizer_kind: objective {self.objective} is no task; train a tokenizer with "
                             "fastllm tokenizer train and name it")  # fmt: skip

    def _others(self) -> dict[str, str]:
        """The settings of other objectives, and whose they are."""
        return {
            name: f"is for objective {' and '.join(home)}, not for {self.objective}"
            for name, home in OWN.items() if self.objective not in home
        }  # fmt: skip

    def unused(self) -> dict[str, str]:
        """The settings that this objective does not read, and why."""
        found = self._others()
        if self.direction != "jsd":
            found.setdefault("jsd_beta", f"the direction is {self.direction}, not jsd")
        if not self.kind.task:
            found["tokenizer_kind"] = "is for tasks"
        return found

    @property
    def kind(self) -> ObjectiveKind:
        return OBJECTIVES[self.objective]

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What the tokenizer must have."""
        return SPECIAL_TOKENS[self.kind.tokens]


def fit_model(config: ObjectiveConfig, model: ModelConfig, given: Collection[str] = ()) -> ModelConfig:
    """``model`` with the parts and heads that the objective needs, where ``given`` does not name them.

    Raises:
        InputError: what is given does not serve the objective.
    """
    kind, changes = config.kind, {}
    for part, needed in (("encoder", kind.encoder), ("decoder", kind.decoder)):
        value = getattr(model, part)
        if needed == (value != "none"):
            continue
        if part in given:
            wanted = "transformer, lstm or gru" if needed else "none"
            also = "; an encoder may be conv too" if needed and part == "encoder" else ""
            raise InputError(f"{part}: objective {config.objective} needs {wanted}, got {value}{also}")
        changes[part] = "transformer" if needed else "none"
    if config.objective == "prefix" and model.decoder != "transformer":
        raise InputError(f"decoder: objective prefix needs transformer, got {model.decoder}")
    changes["heads"] = kind.heads
    # Two segments tell A from B, the question from the text. Masked tokens alone have them for later objectives.
    pairs = bool({"nsp", "span"} & set(kind.heads))
    if pairs and "segments" in given and model.segments < 2:
        raise InputError(f"segments: objective {config.objective} needs at least 2, got {model.segments}")
    if (pairs or "mlm" in kind.heads) and not model.segments and "segments" not in given:
        changes["segments"] = 2
    return model.replace(**changes)
