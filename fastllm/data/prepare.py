"""From text to what training reads: a folder with tokenizer.json, train.bin, validation.bin and corpus.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import InputError, option
from ..files import write_text
from .corpus import Corpus, default_corpus, read_corpus, xz_bits_per_byte
from .token_file import TokenFile, open_token_file, write_token_file
from .tokenizer import Tokenizer

SUMMARY = "corpus.json"


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: tuple[str, ...] = option(
        (), "text files or folders, each file a document; without it, the language reference that Python carries"
    )
    tokenizer: str | None = option(None, "a tokenizer.json to use; without it one is trained on the training text")
    deduplicate: bool = option(True, "remove paragraphs that occurred before")


@dataclass(frozen=True)
class Summary:
    """What corpus.json records. ``key`` is the SHA-256 of all that the folder's content depends on."""

    key: str
    name: str
    notes: tuple[str, ...]
    tokenizer: str
    train_sha256: str
    validation_sha256: str
    xz_bits_per_byte: float | None


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, open."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    summary: Summary

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{part.documents:,} documents, {part.bytes:,} bytes, {len(part):,} tokens {label}"
            for label, part in (("to train on", self.train), ("held out", self.validation))
        ]
        return f"{self.summary.name}: {'; '.join([*parts, *self.summary.notes])}"


def load_corpus(config: DataConfig) -> Corpus:
    """The text that ``config`` names.

    Raises:
        InputError: see :func:`fastllm.data.read_corpus`.
    """
    if config.data:
        return read_corpus(config.data, config.deduplicate)
    return default_corpus(config.deduplicate)


def prepare(corpus: Corpus, folder: str | Path, *, vocab_size: int, tokenizer: Tokenizer | None = None) -> Dataset:
    """Fill ``folder`` from ``corpus``, or open it where it already holds just this.

    Args:
        vocab_size: for the tokenizer that is trained on ``corpus.train``.
        tokenizer: use this one instead.

    Raises:
        InputError: ``vocab_size`` is too small.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    origin = tokenizer.fingerprint if tokenizer else f"BPE {vocab_size}"
    key = hashlib.sha256(f"{corpus.sha256} {origin}".encode()).hexdigest()
    if (folder / SUMMARY).exists():
        try:
            dataset = open_dataset(folder)
        except InputError:
            dataset = None  # cut short or changed: made anew below
        if dataset is not None and dataset.summary.key == key:
            return dataset
    tokenizer = tokenizer or Tokenizer.train(corpus.train, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    write_token_file(folder / "train.bin", corpus.train, tokenizer)
    write_token_file(folder / "validation.bin", corpus.validation, tokenizer)
    summary = Summary(
        key=key,
        name=corpus.name,
        notes=tuple(corpus.notes),
        tokenizer=tokenizer.fingerprint,
        train_sha256=open_token_file(folder / "train.bin", tokenizer).sha256,
        validation_sha256=open_token_file(folder / "validation.bin", tokenizer).sha256,
        xz_bits_per_byte=xz_bits_per_byte(corpus),
    )
    # Last, so that a folder with a summary is complete.
    write_text(folder / SUMMARY, json.dumps(asdict(summary), indent=1) + "\n")
    return open_dataset(folder)


def open_dataset(folder: str | Path) -> Dataset:
    """Open a prepared folder and check that its files belong together.

    Raises:
        InputError: a file is missing, damaged, or made with another tokenizer. Names it.
    """
    folder = Path(folder)
    try:
        summary = Summary(**json.loads((folder / SUMMARY).read_text("utf-8")))
    except OSError as error:
        raise InputError(f"{folder / SUMMARY}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / SUMMARY}: damaged: {error}") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    train = open_token_file(folder / "train.bin", tokenizer)
    validation = open_token_file(folder / "validation.bin", tokenizer)
    for part, expected in ((train, summary.train_sha256), (validation, summary.validation_sha256)):
        if part.sha256 != expected:
            raise InputError(f"{part.path}: not the tokens that {folder / SUMMARY} describes")
    return Dataset(train, validation, tokenizer, summary)
