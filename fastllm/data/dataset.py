"""From text to what training reads: a folder with tokenizer.json, token files and corpus.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import InputError, check_fields, option
from ..files import write_text
from .corpus import Corpus, default_corpus, read_corpus, xz_bits_per_byte
from .prepared import PREPARED, PreparedCorpus
from .token_file import TokenFile
from .token_shards import SHARD_TOKENS, open_token_shards, write_token_shards
from .tokenizer import SPECIAL_TOKENS, Tokenizer

SUMMARY = "corpus.json"
# Characters from which on preparing takes more than a few seconds and is announced. A guess.
LONG_TEXT = 2_000_000


@dataclass(frozen=True)
class DataConfig:
    """The data to train on."""

    data: tuple[str, ...] = option(
        (), "text files or folders, each file a document; or what fastllm prepare or fastllm tokenizer encode wrote; "
        "without it, the language reference that Python carries", metavar="PATH",
    )  # fmt: skip
    tokenizer: str | None = option(
        None, "a tokenizer.json to use; without it one is trained on the training text", metavar="FILE"
    )
    deduplicate: bool = option(True, "remove paragraphs that occurred before")

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Summary:
    """What corpus.json records. ``key`` is the SHA-256 of all that the folder's content depends on; ``train`` and
    ``validation`` name the token files."""

    key: str
    name: str
    notes: tuple[str, ...]
    tokenizer: str
    train: tuple[str, ...]
    train_sha256: str
    validation: tuple[str, ...]
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


def is_prepared(path: str | Path) -> bool:
    """Whether fastllm prepare or fastllm tokenizer encode wrote the folder ``path``."""
    return any((Path(path) / name).exists() for name in (PREPARED, SUMMARY))


def tokenizer_of(config: DataConfig) -> Path | None:
    """The tokenizer.json that ``config`` names, or that made the tokens there; None where one is to be trained."""
    encoded = next((Path(path) for path in config.data if (Path(path) / SUMMARY).exists()), None)
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    return None if encoded is None else encoded / "tokenizer.json"


def load_corpus(config: DataConfig, held_out: Sequence[str] = ()) -> Corpus | PreparedCorpus:
    """The text that ``config`` names.

    Args:
        held_out: text files or folders to score on; without them a part of the text is.

    Raises:
        InputError: see :func:`fastllm.data.read_corpus`; or ``held_out`` is given for text that has a split already.
    """
    if not config.data:
        if held_out:
            raise InputError("held_out: needs data to train on; the text that Python carries has a split already")
        return default_corpus(config.deduplicate)
    prepared = [path for path in config.data if (Path(path) / PREPARED).exists()]
    if prepared and held_out:
        raise InputError(f"held_out: {prepared[0]} was written by fastllm prepare and has a split already")
    if prepared and len(config.data) > 1:
        raise InputError(f"data: {prepared[0]} was written by fastllm prepare; give it alone")
    return PreparedCorpus(prepared[0]) if prepared else read_corpus(config.data, config.deduplicate, held_out)


def load_dataset(
    config: DataConfig, folder: str | Path, *, vocab_size: int, say: Callable[[str], None] = lambda text: None,
    special_tokens: Sequence[str] = SPECIAL_TOKENS["causal"], held_out: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """The tokens of the data that ``config`` names. They are encoded into ``folder``, or opened in place, and then
    ``folder`` notes where.

    Args:
        vocab_size, special_tokens: for a tokenizer that is trained.
        say: called with a line of text before each long step.
        held_out: text files or folders to score on; without them a part of the text is held out.

    Raises:
        InputError: the text, the tokens or the tokenizer cannot be used.
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder)
    ready = [path for path in config.data if (Path(path) / SUMMARY).exists()]
    if ready:
        if len(config.data) > 1:
            raise InputError(f"data: {ready[0]} holds tokens; give it alone")
        if held_out:
            raise InputError(f"held_out: {ready[0]} holds tokens that are split already")
        dataset = open_dataset(ready[0])
        if config.tokenizer and Tokenizer.load(config.tokenizer).fingerprint != dataset.tokenizer.fingerprint:
            raise InputError(f"{config.tokenizer}: not the tokenizer that made the tokens in {ready[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SUMMARY, json.dumps({"folder": str(Path(ready[0]).resolve())}) + "\n")
        return dataset
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    corpus = load_corpus(config, held_out)
    size = corpus.characters
    if size > LONG_TEXT:
        say(f"{'' if tokenizer else 'training a tokenizer on and '}encoding {size:,} characters")
    return prepare(corpus, folder, vocab_size=vocab_size, tokenizer=tokenizer, special_tokens=special_tokens)


def prepare(
    corpus: Corpus | PreparedCorpus, folder: str | Path, *, vocab_size: int = 0, tokenizer: Tokenizer | None = None,
    special_tokens: Sequence[str] = SPECIAL_TOKENS["causal"], shard_tokens: int = SHARD_TOKENS,
) -> Dataset:  # fmt: skip
    """Fill ``folder`` from ``corpus``, or open it if it already holds exactly this.

    Args:
        vocab_size, special_tokens: for the tokenizer that is trained on ``corpus.train``.
        tokenizer: use this one instead.
        shard_tokens: the number of ids after which a token file ends; the document that reaches it is still in the
            file.

    Raises:
        InputError: ``vocab_size`` or ``shard_tokens`` is too small, or a part of ``corpus`` is empty.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if shard_tokens < 1:
        raise InputError(f"shard_tokens: expected at least 1, got {shard_tokens}")
    if isinstance(corpus, Corpus) and not (corpus.train and corpus.validation):
        raise InputError(f"corpus: {corpus.name}: expected documents to train on and to validate, got "
                         f"{len(corpus.train)} and {len(corpus.validation)}")  # fmt: skip
    origin = tokenizer.fingerprint if tokenizer else f"BPE {vocab_size} {' '.join(special_tokens)}"
    key = hashlib.sha256(f"{corpus.sha256} {origin} {shard_tokens}".encode()).hexdigest()
    if (folder / SUMMARY).exists():
        try:
            dataset = open_dataset(folder)
        except InputError:
            dataset = None  # cut short or changed: made anew below
        if dataset is not None and dataset.summary.key == key:
            return dataset
    tokenizer = tokenizer or Tokenizer.train(corpus.train, vocab_size, special_tokens=special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    # Without it the folder is not whole.
    (folder / SUMMARY).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    parts = {}
    for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
        parts[name], parts[f"{name}_sha256"] = write_token_shards(folder, name, documents, tokenizer, shard_tokens)
    summary = Summary(
        key=key,
        name=corpus.name,
        notes=tuple(corpus.notes),
        tokenizer=tokenizer.fingerprint,
        xz_bits_per_byte=xz_bits_per_byte(corpus),
        **parts,
    )
    # Last, so that a folder with a summary is complete.
    write_text(folder / SUMMARY, json.dumps(asdict(summary), indent=1) + "\n")
    return open_dataset(folder)


def _check_summary(summary: Summary) -> None:
    """Raise a TypeError or ValueError for a field of another kind than :func:`prepare` writes; names it."""
    for name, value in vars(summary).items():
        if name == "xz_bits_per_byte":
            fits, expected = value is None or type(value) in (int, float), "a number or null"
        elif name in ("notes", "train", "validation"):
            fits, expected = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts"
        else:
            fits, expected = isinstance(value, str), "a text"
        if not fits:
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
    for name in ("train", "validation"):
        if not getattr(summary, name):
            raise ValueError(f"{name}: expected the name of a token file at least")


def open_dataset(folder: str | Path) -> Dataset:
    """Open a prepared folder and check that its files belong together.

    Raises:
        InputError: a file is missing, damaged, or made with another tokenizer. Names it.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / SUMMARY).read_text("utf-8"))
        if "folder" in content:
            return open_dataset(content["folder"])
        summary = Summary(**content)
        _check_summary(summary)
    except OSError as error:
        raise InputError(f"{folder / SUMMARY}: {error.strerror}") from error
    except InputError:
        raise
    # A folder that names itself recurses too.
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / SUMMARY}: damaged: {error}") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    train = open_token_shards(folder, summary.train, tokenizer, summary.train_sha256)
    validation = open_token_shards(folder, summary.validation, tokenizer, summary.validation_sha256)
    for part, expected in ((train, summary.train_sha256), (validation, summary.validation_sha256)):
        if part.sha256 != expected:
            raise InputError(f"{part.path}: not the tokens that {folder / SUMMARY} describes")
    return Dataset(train, validation, tokenizer, summary)
