"""A tokenizer looked at: the pieces of a text, and the part of a corpus that it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .corpus import Corpus
from .prepared import PreparedCorpus
from .tokenizer import Tokenizer


class ShownSample:
    """Training documents of ``corpus``, evenly taken, of about ``limit`` bytes in all; ``note`` says which."""

    def __init__(self, corpus: Corpus | PreparedCorpus, limit: int):
        self._documents = corpus.train
        size = corpus.size if isinstance(corpus, PreparedCorpus) else sum(len(d.encode()) for d in corpus.train)
        self._every = max(1, -(-size // limit))
        whole = f"{size:,} bytes of text"
        self.note = (
            f"training on all {whole}"
            if self._every == 1
            else f"training on a sample: one document in {self._every} of {whole}"
        )

    def __iter__(self) -> Iterator[str]:
        return (document for number, document in enumerate(self._documents) if number % self._every == 0)


class ShownPieces:
    """``text`` as ``tokenizer`` cuts it."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self.ids = tokenizer.encode(text)
        self._tokenizer = tokenizer
        self._size = len(text.encode())
        self._counts = Counter(self.ids)

    @property
    def strings(self) -> list[str]:
        """The pieces as text; bytes of a character that lies in several pieces as ``\\xNN``."""
        return [self._string(index) for index in self.ids]

    @property
    def bytes_per_token(self) -> float:
        return self._size / max(1, len(self.ids))

    def rarest(self, count: int = 12) -> list[tuple[str, str]]:
        """The pieces that the text has least often, and how often."""
        order = sorted(self._counts, key=lambda index: (self._counts[index], index))
        return [(self._string(index), f" x{self._counts[index]}") for index in order[:count]]

    def longest(self, count: int = 12) -> list[tuple[str, str]]:
        """The vocabulary's longest pieces, and their bytes."""
        special = set(self._tokenizer.special_tokens.values())
        sizes = {i: len(self._tokenizer.token_bytes(i)) for i in range(self._tokenizer.vocab_size) if i not in special}
        order = sorted(sizes, key=lambda index: (-sizes[index], index))
        return [(self._string(index), f" {sizes[index]}") for index in order[:count]]

    def _string(self, index: int) -> str:
        return self._tokenizer.token_bytes(index).decode("utf-8", "backslashreplace")
