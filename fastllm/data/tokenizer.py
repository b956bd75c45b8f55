"""Byte-level BPE (Sennrich et al. 2016; over bytes as in Radford et al. 2019), trained by Hugging Face's tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..config import InputError
from ..files import write_text

END_OF_TEXT = "<|endoftext|>"
# 256 bytes and the end-of-text token: with fewer, some text could not be encoded.
SMALLEST_VOCABULARY = 257
# Pieces that are encoded at once: one Encoding takes some hundred bytes for each token.
PIECE = 1 << 18


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of about :data:`PIECE` characters that encode to the same tokens as the whole.

    The byte-level pre-tokenizer never joins a newline to a word, so a cut between two newlines of which the second
    is followed by a word changes nothing.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = re.compile(r"\n(?=\n\S)").search(text, start + PIECE)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class Tokenizer:
    """Text to token ids and back, without loss for any Unicode text.

    Text never encodes to the end-of-text id, not even the literal ``<|endoftext|>``.
    """

    def __init__(self, definition: str):
        self._inner = tokenizers.Tokenizer.from_str(definition)
        self._inner.encode_special_tokens = True
        self._definition = definition

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train on ``documents``. The same documents give the same tokenizer.

        Args:
            vocab_size: the most tokens to have, end-of-text included. A small corpus may yield fewer.

        Raises:
            InputError: ``vocab_size`` is too small to encode every byte.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise InputError(f"vocab_size: expected at least {SMALLEST_VOCABULARY} (bytes + end), got {vocab_size}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner.to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: the file is missing, is not one, or has no ``<|endoftext|>``.
        """
        try:
            tokenizer = cls(Path(path).read_text("utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except Exception as error:  # tokenizers raises bare Exception for every malformed file
            raise InputError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from error
        if tokenizer._inner.token_to_id(END_OF_TEXT) is None:
            raise InputError(f"{path}: the tokenizer has no {END_OF_TEXT} token")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, whole or not at all."""
        write_text(path, self._definition)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @cached_property
    def end_of_text(self) -> int:
        """The id that starts and ends every document."""
        return self._inner.token_to_id(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition, white space and key order apart, in hexadecimal."""
        canonical = json.dumps(json.loads(self._definition), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no end-of-text is added."""
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._inner.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; end-of-text tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ``ids``, as it comes: each piece is given out once its characters are complete."""
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            text = self.decode(pending)
            # A character of several bytes may be spread over up to four tokens.
            if text and (not text.endswith("\ufffd") or len(pending) > 4):
                yield text
                pending.clear()
        if pending:
            yield self.decode(pending)
