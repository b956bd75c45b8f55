"""A task's examples beside its tokenizer: what a run trains on, kept with the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import InputError
from ..data import Tokenizer
from ..data.held_out import HELD_OUT, is_held_out
from ..files import write_text

SUMMARY = "examples.json"


@dataclass(frozen=True)
class ExampleSet:
    """Examples, and the SHA-256 of the file that holds them.

    ``key``: what batches are drawn by, the SHA-256 of the examples as they were given: without a reference's
    log-probabilities, whose last bits depend on the machine and on the size of micro-batches.
    """

    path: Path
    examples: list[dict]
    sha256: str
    key: str

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class TaskSummary:
    """What examples.json records. ``labels`` are a classifier's, in the order of its logits."""

    objective: str
    name: str
    labels: tuple[str, ...]
    tokenizer: str
    train_sha256: str
    validation_sha256: str
    notes: tuple[str, ...]
    xz_bits_per_byte: None = None


@dataclass(frozen=True)
class TaskDataset:
    """A prepared folder, open."""

    train: ExampleSet
    validation: ExampleSet
    tokenizer: Tokenizer
    summary: TaskSummary

    @property
    def labels(self) -> tuple[str, ...]:
        return self.summary.labels

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{len(self.train):,} examples to train on", f"{len(self.validation):,} held out", *self.summary.notes]
        return f"{self.summary.name}: {'; '.join(parts)}"


def split_examples(examples: list[dict]) -> tuple[list[dict], list[dict]]:
    """One example in ten for validation, spread evenly; of questions one text in ten, with all its questions.

    Raises:
        InputError: there are too few to hold any out.
    """
    groups = list(dict.fromkeys(e["context"] for e in examples)) if "context" in examples[0] else None
    count = len(examples) if groups is None else len(groups)
    if count < 2:
        raise InputError("data: one example (of questions: one text) cannot be split; give more, or a held_out file")
    step = min(HELD_OUT, count)
    if groups is None:
        held = [is_held_out(i, step) for i in range(len(examples))]
    else:
        out = {group for i, group in enumerate(groups) if is_held_out(i, step)}
        held = [e["context"] in out for e in examples]
    return (
        [e for e, out in zip(examples, held, strict=True) if not out],
        [e for e, out in zip(examples, held, strict=True) if out],
    )


def unique(examples: list[dict]) -> list[dict]:
    """``examples`` without repetitions."""
    return list({json.dumps(example, sort_keys=True): example for example in examples}.values())


def label_names(train: list[dict], validation: list[dict]) -> tuple[str, ...]:
    """The labels, sorted.

    Raises:
        InputError: there are fewer than two, or the held-out examples have one that no training example has.
    """
    labels = tuple(sorted({example["label"] for example in train}))
    if len(labels) < 2:
        raise InputError(f"data: a classifier needs at least two labels, got {', '.join(labels) or 'none'}")
    strange = sorted({example["label"] for example in validation} - set(labels))
    if strange:
        raise InputError(f"held_out: label {strange[0]!r} is not among those trained on: {', '.join(labels)}")
    return labels


def texts(examples: list[dict]) -> list[str]:
    """All text in ``examples``, each once: what a tokenizer is trained on."""
    names = ("source", "target", "text", "question", "context", "prompt", "answer", "chosen", "rejected")
    found = []
    for example in examples:
        for value in (example[name] for name in names if name in example):
            found += [value] if isinstance(value, str) else [message["content"] for message in value]
        found += [message["content"] for message in example.get("messages", ())]
    return list(dict.fromkeys(found))


def _as_lines(examples: list[dict]) -> str:
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepare_examples(
    folder: str | Path, objective: str, name: str, train: list[dict], validation: list[dict], tokenizer: Tokenizer,
    *, notes: Sequence[str] = (),
) -> TaskDataset:  # fmt: skip
    """Write the examples and the tokenizer into ``folder``, and open it.

    Args:
        notes: what people are told of the examples.

    Raises:
        InputError: the labels do not serve.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    labels = label_names(train, validation) if objective == "classify" else ()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    digests, notes, before, held = {}, list(notes), len(train), len(validation)
    train = unique(train)
    # What is trained on must not be scored on.
    seen = {json.dumps(example, sort_keys=True) for example in train}
    validation = [e for e in unique(validation) if json.dumps(e, sort_keys=True) not in seen]
    if before > len(train):
        notes.append(f"{before - len(train):,} repeated examples left out")
    if held > len(validation):
        notes.append(f"{held - len(validation):,} held-out examples left out that are repeated or trained on")
    if not validation:
        raise InputError("held_out: every example is among those trained on")
    for part, examples in (("train", train), ("validation", validation)):
        text = _as_lines(examples)
        write_text(folder / f"{part}.jsonl", text)
        digests[f"{part}_sha256"] = _sha256(text)
    summary = TaskSummary(objective, name, labels, tokenizer.fingerprint, notes=tuple(notes), **digests)
    write_text(folder / SUMMARY, json.dumps(asdict(summary), indent=1) + "\n")
    return open_examples(folder)


def open_examples(folder: str | Path) -> TaskDataset:
    """Open a prepared folder and check that its files are as they were written.

    Raises:
        InputError: a file is missing, damaged or changed. Names it.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / SUMMARY).read_text("utf-8"))
        summary = TaskSummary(**{**values, "labels": tuple(values["labels"]), "notes": tuple(values["notes"])})
    except OSError as error:
        raise InputError(f"{folder / SUMMARY}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{folder / SUMMARY}: damaged: {error}") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != summary.tokenizer:
        raise InputError(f"{folder / 'tokenizer.json'}: not the tokenizer that {folder / SUMMARY} describes")
    parts = []
    for part, digest in (("train", summary.train_sha256), ("validation", summary.validation_sha256)):
        path = folder / f"{part}.jsonl"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(f"{path}: damaged: its SHA-256 does not match {folder / SUMMARY}")
        examples = [json.loads(line) for line in content.decode().split("\n") if line]
        given = [{name: value for name, value in example.items() if name != "reference"} for example in examples]
        parts.append(ExampleSet(path, examples, digest, digest if given == examples else _sha256(_as_lines(given))))
    train, validation = parts
    return TaskDataset(train, validation, tokenizer, summary)
