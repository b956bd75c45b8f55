"""Text to token ids and back: a tokenizer.json of Hugging Face's tokenizers, and what its special tokens mean."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from ..config import InputError, read_plain
from ..files import write_text
from .sentences import sentence_starts
from .tokenizer_training import END_OF_TEXT, KINDS, SPECIAL_TOKENS, train_tokenizer

__all__ = ["END_OF_TEXT", "KINDS", "SPECIAL_TOKENS", "Tokenizer"]

# The names under which tokenizers know each role, the first one that a tokenizer has counts.
ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>", END_OF_TEXT),
    "eos": ("[EOS]", "</s>", "<eos>", "<|end_of_text|>", END_OF_TEXT),
}
# What separates documents, in this order of preference.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "[EOS]", "</s>", "<eos>", "[SEP]")
# Pieces that are encoded at once: one Encoding takes some hundred bytes for each token.
PIECE = 1 << 18

# How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others from U+0100 on (Radford et al. 2019).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# Normalizers that change a character, or what follows it and combines with it, whatever else is in the text.
_BY_CHARACTER = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents")
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of about :data:`PIECE` characters that encode to the same tokens as the whole.

    No pre-tokenizer of ours joins a newline to a word, so a cut between two newlines changes nothing where a word
    follows the second.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = re.compile(r"\n(?=\n\S)").search(text, start + PIECE)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _may_be_cut(parts: dict) -> bool:
    """Whether :func:`_pieces` is right for the tokenizer of this definition."""
    splitter, normalizer = parts.get("pre_tokenizer") or {}, parts.get("normalizer") or {}
    kind = splitter.get("type")
    single = parts["model"].get("type") == "BPE" and not parts["model"].get("merges")
    by_words = kind in ("BertPreTokenizer", "Whitespace") or (
        kind == "ByteLevel" and not splitter.get("add_prefix_space", True) and splitter.get("use_regex", True)
    )
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    # A token of its own may reach across the cut.
    others = [token for token in parts.get("added_tokens") or [] if not token.get("special")]
    return (
        (by_words or (kind == "Split" and single))
        and all(step.get("type") in _BY_CHARACTER for step in steps)
        and not any("\n" in token["content"] or token.get("lstrip") or token.get("rstrip") for token in others)
    )


def _chat_template(folder: Path) -> str | None:
    """The chat template in ``folder``, as transformers writes it: a file of its own, or in tokenizer_config.json."""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        return read_plain(alone).decode()
    if not config.is_file():
        return None
    try:
        found = json.loads(read_plain(config)).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{config}: not a tokenizer's configuration: {error!r}") from error
    return found


class Tokenizer:
    """Text to token ids and back. Kinds other than ``wordpiece`` and ``word`` lose nothing of any Unicode text.

    Text never encodes to a special token's id, not even the literal ``<|endoftext|>``; only :meth:`encode_template`
    reads special tokens. ``chat_template`` is a Jinja template in transformers' form, or None.
    """

    def __init__(self, definition: str, chat_template: str | None = None):
        self.chat_template = chat_template
        self._inner = tokenizers.Tokenizer.from_str(definition)
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.definition = definition
        parts = json.loads(definition)
        # Alone, or one step of several: Llama 3's text is split by a pattern first.
        self._byte_level = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
        self._cuts = _may_be_cut(parts)

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, kind: str = "bpe", *,
        special_tokens: Sequence[str] = SPECIAL_TOKENS["causal"], lowercase: bool = False,
    ) -> Tokenizer:  # fmt: skip
        """Train on ``documents``. The same documents give the same tokenizer, except for kind ``unigram``.

        Ctrl-C raises at once. In a Python session the trainer then goes on in the background until it is through.

        Args:
            vocab_size: the most tokens to have, special ones included. A small corpus may yield fewer.
            kind: ``bpe``, ``unigram``, ``wordpiece``, ``word`` or ``char``; see
                :mod:`fastllm.data.tokenizer_training`.
            special_tokens: they get the first ids. :data:`SPECIAL_TOKENS` has those of each objective. A kind that
                cannot encode every text gets ``[UNK]`` too.
            lowercase: ``wordpiece`` and ``word`` only: lower-case the text (and for ``wordpiece`` strip accents, as
                BERT does).

        Raises:
            InputError: ``vocab_size`` is too small, or there is no text. Names the argument.
        """
        return cls(train_tokenizer(documents, vocab_size, kind, special_tokens, lowercase).to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``, and the chat template of the files beside it, if they have one.

        Raises:
            InputError: the file is missing, is not a tokenizer, or has no token that separates documents.
        """
        try:
            tokenizer = cls(read_plain(path).decode(), _chat_template(Path(path).parent))
        except InputError:
            raise
        except BaseException as error:
            # tokenizers raises bare Exception for every malformed file; a panic in it is no Exception to Python.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from error
        if tokenizer._named(SEPARATORS) is None:
            raise InputError(f"{path}: the tokenizer has no {END_OF_TEXT} token")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, whole or not at all."""
        write_text(path, self.definition)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the ``tokenizer_config.json`` that names the special tokens to transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")
        roles = {f"{role}_token": self.token(index) for role, index in self.special_tokens.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; below it there may be ids that no token has."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self._inner.get_vocab().values(), default=-1) + 1

    @cached_property
    def end_of_text(self) -> int:
        """The id that starts and ends every document."""
        index = self._named(SEPARATORS)
        if index is None:
            raise InputError(f"tokenizer: no token that ends a text; expected one of {', '.join(SEPARATORS)}")
        return index

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the roles ``pad``, ``unk``, ``cls``, ``sep``, ``mask``, ``bos`` and ``eos``, where it has them."""
        found = {role: self._named(names) for role, names in ROLES.items()}
        return {role: index for role, index in found.items() if index is not None}

    def special(self, role: str) -> int:
        """The id of the token for ``role``, as in :attr:`special_tokens`.

        Raises:
            InputError: there is no such token. The message says how to get one.
        """
        if role not in self.special_tokens:
            names = "masked" if role in ("cls", "sep", "mask") else "seq2seq"
            raise InputError(f"tokenizer: no {role} token; train one with fastllm tokenizer train --objective {names}")
        return self.special_tokens[role]

    def token(self, index: int) -> str:
        """The token with id ``index`` as the vocabulary spells it, or "" if there is none."""
        return "" if index < 0 else self._inner.id_to_token(index) or ""

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that token ``index`` stands for inside a text. For a special token these are its name."""
        token = self.token(index)
        if token in self._special_names:
            return token.encode()
        if self._byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.removeprefix("##").encode()

    @cached_property
    def _special_names(self) -> frozenset[str]:
        return frozenset(t.content for t in self._inner.get_added_tokens_decoder().values())

    def _named(self, names: Sequence[str]) -> int | None:
        return next((i for i in map(self._inner.token_to_id, names) if i is not None), None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition, white space and key order apart, in hexadecimal."""
        canonical = json.dumps(json.loads(self.definition), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no end-of-text is added."""
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._inner.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a chat template's ``text``. Names of special tokens in it become these tokens."""
        _check_text(text)
        return self._reads_special.encode(text, add_special_tokens=False).ids

    @cached_property
    def _reads_special(self) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer.from_str(self.definition)
        inner.no_truncation()
        inner.no_padding()
        return inner

    def special_in(self, text: str) -> str | None:
        """The name of a special token that ``text`` contains literally, or None."""
        return next((name for name in sorted(self._skipped_names) if name in text), None)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text its ids, uint32, and where among them its sentences begin, int64 and ascending.

        It uses all cores, unless ``TOKENIZERS_PARALLELISM=false``. A sentence begins at the first token that reaches
        beyond its first character. A sentence without tokens has no start.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of texts, got one text")
        pieces = [list(self._pieces(text)) for text in texts]
        encoded = iter(self._inner.encode_batch([p for some in pieces for p in some], add_special_tokens=False))
        result = []
        for text, some in zip(texts, pieces, strict=True):
            starts = np.asarray(sentence_starts(text), np.int64)
            ids, marks, count, begin = [], [], 0, 0
            for piece in some:
                encoding = next(encoded)
                ids.append(np.asarray(encoding.ids, np.uint32))
                ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]
                inside = starts[(starts >= begin) & (starts < begin + len(piece))] - begin
                # Tokens of one character's bytes all end where it ends.
                positions = np.searchsorted(ends, inside, side="right")
                marks.append(positions[positions < len(ends)] + count)
                count, begin = count + len(ends), begin + len(piece)
            result.append((np.concatenate(ids), np.unique(np.concatenate(marks))))
        return result

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text``, and for each the characters [start, end) that it stands for."""
        _check_text(text)
        encoding = self._inner.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer. Those of ``names`` whose role it lacks are added at the end of the vocabulary."""
        missing = [
            name
            for name in names
            if not any(self._named(known) is not None for known in ROLES.values() if name in known)
            and self._inner.token_to_id(name) is None
        ]
        if not missing:
            return self
        inner = tokenizers.Tokenizer.from_str(self.definition)
        inner.add_special_tokens(missing)
        return Tokenizer(inner.to_str(), self.chat_template)

    def _pieces(self, text: str) -> Iterable[str]:
        _check_text(text)
        return _pieces(text) if self._cuts else (text,)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``. End-of-text tokens are left out, and bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative.
        """
        ids = list(ids)
        if any(index < 0 for index in ids):
            raise ValueError(f"ids: expected none below 0, got {min(ids)}")
        return self._inner.decode(ids, skip_special_tokens=True)

    def stream(self, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        """The text of ``ids`` in pieces, as it becomes known. Joined they are :meth:`decode` of all of them.

        Args:
            after: the ids of a whole text that ``ids`` continue. The pieces then continue :meth:`decode` of that text,
                with the space before the first word if the tokenizer's decoder puts one there.

        A piece is yielded once no later token can change it. Its characters are complete, and so is a run of tokens for
        single bytes, which decoders with a byte fallback read as a whole.
        """
        # What was last given out is decoded again before what is new: decoders treat a text's first token apart.
        window = list(self._shown(after))
        given, complete = self.decode(window), len(window)
        for token in self._shown(ids):
            window.append(token)
            if self._byte_fallback and _BYTE_TOKEN.fullmatch(self.token(token)):
                continue
            text = self.decode(window)
            # The beginning of a character of several bytes is one U+FFFD, at the end.
            stable = text.removesuffix("\ufffd")
            if len(stable) > len(given):
                yield stable[len(given) :]
                given = stable
            if stable == text:
                last = window[complete:]
                complete = len(window)
                alone = self.decode(last)
                if alone and "\ufffd" not in alone:
                    window, given, complete = last, alone, len(last)
        rest = self.decode(window)[len(given) :]
        if rest:
            yield rest

    def _shown(self, ids: Iterable[int]) -> Iterator[int]:
        """Those of ``ids`` that :meth:`decode` does not leave out."""
        for token in map(int, ids):
            name = self.token(token)
            if name and name not in self._skipped_names:
                yield token

    @cached_property
    def _byte_fallback(self) -> bool:
        return '"ByteFallback"' in json.dumps(json.loads(self.definition).get("decoder"))

    @cached_property
    def _skipped_names(self) -> frozenset[str]:
        """Names of the special tokens."""
        return frozenset(t.content for t in self._inner.get_added_tokens_decoder().values() if t.special)
