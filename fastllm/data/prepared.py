"""The text that ``fastllm prepare`` wrote, as a corpus that is read as a stream."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import InputError
from .held_out import HELD_OUT, is_held_out

PREPARED = "prepared.json"
# Of a large corpus no more than about this many documents are held out. A guess.
MOST_HELD_OUT = 2000


@dataclass(frozen=True)
class _Part:
    """The documents of one side of the split; each iteration reads them anew."""

    corpus: PreparedCorpus
    validation: bool

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(self.corpus.documents()):
            if is_held_out(number, self.corpus.every) == self.validation:
                yield document["text"]


class PreparedCorpus:
    """A folder that ``fastllm prepare`` finished. ``train`` and ``validation`` are iterables of texts.

    Every tenth document is validation (number i, from 0, when i % 10 == 9); of a corpus beyond 20,000 documents, one in
    as many as leaves about 2,000.

    Raises:
        InputError: the folder is not one, is unfinished, or has too few documents to split. Names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / PREPARED
        try:
            content = json.loads(manifest.read_text("utf-8"))
            self.name, self._shards = str(folder), content["shards"]
            self.count, self.characters = content["documents"], content["characters"]
            self.size = content["bytes"]
        except OSError as error:
            raise InputError(f"{manifest}: {error.strerror}; has fastllm prepare finished?") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{manifest}: damaged: {error}") from error
        self.every = max(HELD_OUT, self.count // MOST_HELD_OUT)
        if self.count < HELD_OUT:
            raise InputError(f"{self.folder}: {self.count} documents are too few to split; at least {HELD_OUT} needed")
        self.notes = [f"one document in {self.every} is held out"]

    @property
    def train(self) -> Iterable[str]:
        return _Part(self, validation=False)

    @property
    def validation(self) -> Iterable[str]:
        return _Part(self, validation=True)

    @property
    def sha256(self) -> str:
        """SHA-256 of the shards' own and of the split, in hexadecimal."""
        return hashlib.sha256(json.dumps([self._shards, self.every]).encode()).hexdigest()

    def documents(self) -> Iterator[dict]:
        """All documents in order: ``id``, ``text`` and what else is known about each.

        Raises:
            InputError: a shard is missing or damaged; names it.
        """
        for shard in self._shards:
            path = self.folder / shard["name"]
            count = 0
            try:
                with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
                    for line in lines:
                        count += 1
                        yield json.loads(line)
            except FileNotFoundError:
                raise InputError(f"{path}: no such file") from None
            except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
                raise InputError(f"{path}: damaged: {error}") from error
            if count != shard["documents"]:
                raise InputError(f"{path}: damaged: {shard['documents']} documents expected, {count} found")
