"""A model's predictions on held-out examples, in words."""

from __future__ import annotations

from ..generate.sampling import generate
from ..models import Encoder, EncoderDecoder, LanguageModel, Model
from .answer import answers
from .classify import classify
from .features import answer_ids
from .store import TaskDataset
from .translate import translate


def marked(context: str, start: int, end: int, around: int = 80) -> str:
    """The part of ``context`` around characters [start, end), which stand in brackets, on one line."""
    before, after = context[max(0, start - around) : start], context[end : end + around]
    shown = f"{'...' if start > around else ''}{before}[{context[start:end]}]{after}"
    return " ".join((shown + ("..." if end + around < len(context) else "")).split())


# An answer to a prompt is shown up to this many tokens. A guess.
ANSWER_TOKENS = 100


def _answered(model: LanguageModel, tokenizer, example: dict) -> str:
    """A prompt, the answer that it came with, and the model's likeliest one."""
    parts = example.get("parts") or [[example["prompt"], False], [example["chosen"], True]]
    # What stands before the last answer.
    asked = {"parts": parts[:-1], "templated": example["templated"]}
    ids = answer_ids(asked, tokenizer)[0]
    room = min(ANSWER_TOKENS, model.config.context_length - len(ids))
    found = generate(model, ids, max_new_tokens=room, temperature=0.0, stop_token=tokenizer.end_of_text)
    shown = "".join(text for text, _ in parts[:-1])
    return f"prompt:   {shown}\nexpected: {parts[-1][0]}\nanswer:   {tokenizer.decode(found)}\n"


def _translated(model: EncoderDecoder, dataset: TaskDataset, examples: list[dict]) -> list[str]:
    found = translate(model, dataset.tokenizer, [e["source"] for e in examples])
    return [
        f"source:      {example['source']}\nreference:   {example['target']}\ntranslation: {text}\n"
        for example, text in zip(examples, found, strict=True)
    ]


def _classified(model: Encoder, dataset: TaskDataset, examples: list[dict]) -> list[str]:
    blocks = []
    table = classify(model, dataset.tokenizer, [e["text"] for e in examples])
    for example, row in zip(examples, table, strict=True):
        best = int(row.argmax())
        text = " ".join(example["text"].split())[:200]
        blocks.append(f"{text}\n  -> {dataset.labels[best]} ({row[best]:.2f}); labelled {example['label']}\n")
    return blocks


def _found(model: Encoder, dataset: TaskDataset, examples: list[dict]) -> list[str]:
    blocks = []
    spans = answers(model, dataset.tokenizer, [(e["question"], e["context"]) for e in examples])
    for example, span in zip(examples, spans, strict=True):
        expected = example["answers"][0]["text"] if example["answers"] else "(none)"
        blocks.append(f"{example['question']}\n  {marked(example['context'], span.start, span.end)}\n"
                      f"  expected: {' '.join(expected.split())}\n")  # fmt: skip
    return blocks


def show(model: Model, dataset, count: int) -> str:
    """What ``model`` makes of the first ``count`` held-out examples; of a stream of text, nothing."""
    if not isinstance(dataset, TaskDataset):
        return ""
    examples = dataset.validation.examples[:count]
    blocks: list[str] = []
    if isinstance(model, EncoderDecoder):
        blocks = _translated(model, dataset, examples)
    elif isinstance(model, LanguageModel):
        blocks = [_answered(model, dataset.tokenizer, example) for example in examples]
    elif "classify" in model.config.heads:
        blocks = _classified(model, dataset, examples)
    elif "span" in model.config.heads:
        blocks = _found(model, dataset, examples)
    return "\n".join(blocks)
