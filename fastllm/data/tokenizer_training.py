"""The five kinds of tokenizer, trained by Hugging Face's tokenizers.

==========  =========================================================================  ==========================
kind        model                                                                      any Unicode text comes back
==========  =========================================================================  ==========================
bpe         byte-pair merges (Sennrich et al. 2016) over bytes (Radford et al. 2019)   yes
unigram     the likeliest pieces (Kudo 2018) over bytes                                yes
char        the most frequent characters; any other one as its UTF-8 bytes             yes
wordpiece   BERT's: words in pieces, ``##`` inside a word (Devlin et al. 2019)         no: white space, rare characters
word        the most frequent words and runs of punctuation                            no: white space, unknown words
==========  =========================================================================  ==========================

The same documents give the same tokenizer, except for unigram: its trainer adds floats in the order of a hash table, so
that two trainings may differ in a few pieces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ..config import InputError
from .interruptible import train_from_texts

KINDS = ("bpe", "unigram", "wordpiece", "word", "char")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "[UNK]"
# What each objective needs beside the text's own pieces; the first one separates documents.
SPECIAL_TOKENS = {
    "causal": (END_OF_TEXT,),
    "masked": (END_OF_TEXT, "[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"),
    "seq2seq": (END_OF_TEXT, "[PAD]", UNKNOWN, "[BOS]", "[EOS]"),
    "all": (END_OF_TEXT, "[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"),
}
BYTES = 256
# Trainers reserve memory for as many as are asked for, and abort the process where there is none.
MOST_TOKENS = 10_000_000
# Characters of a word, or of white space, that a trainer of merges sees at once: its time grows with the square of a
# word's length. 80,000 equal characters took 1.7 s of one core of an AMD EPYC, 3 million more than ten minutes.
WORD = 1024
LONG_RUN = re.compile(rf"(?<!\S)\S{{{WORD + 1},}}|(?<!\s)\s{{{WORD + 1},}}")
# Characters of a text that the character tokenizer's model sees at once; it looks each run up in a cache first.
RUN = 64


def check_training(vocab_size: int, kind: str, special_tokens: Sequence[str], lowercase: bool = False) -> list[str]:
    """The special tokens that a tokenizer of this kind gets; arguments as :meth:`fastllm.data.Tokenizer.train`'s.

    Raises:
        InputError: an argument does not serve; names it.
    """
    if kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if lowercase and kind not in ("wordpiece", "word"):
        raise InputError(f"lowercase: only a wordpiece or word tokenizer may lose letter case, not {kind}")
    if not isinstance(vocab_size, int):
        raise InputError(f"vocab_size: expected a whole number, got {vocab_size!r}")
    if isinstance(special_tokens, str):
        raise InputError(f"special_tokens: expected a list of names, got one text, {special_tokens!r}")
    if not special_tokens or len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
        raise InputError(f"special_tokens: expected one or more different names, got {list(special_tokens)}")
    special = list(special_tokens)
    if kind in ("wordpiece", "word", "unigram") and not {UNKNOWN, "<unk>"} & set(special):
        special.append(UNKNOWN)
    smallest = len(special) + (BYTES if kind in ("bpe", "unigram", "char") else 1)
    if vocab_size < smallest:
        what = "bytes and special tokens" if smallest > BYTES else "special tokens and a word"
        raise InputError(f"vocab_size: expected at least {smallest} ({what}) for kind {kind}, got {vocab_size}")
    if vocab_size > MOST_TOKENS:
        raise InputError(f"vocab_size: expected at most {MOST_TOKENS}, got {vocab_size}")
    return special


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, kind: str, special_tokens: Sequence[str], lowercase: bool
) -> tokenizers.Tokenizer:
    """Train one; see :meth:`fastllm.data.Tokenizer.train`."""
    special = check_training(vocab_size, kind, special_tokens, lowercase)
    if isinstance(documents, str):
        raise InputError("documents: expected a list of texts, got one text")
    unknown = next((name for name in (UNKNOWN, "<unk>") if name in special), None)
    common = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False}
    if kind == "char":
        return _characters(documents, vocab_size, special)
    if kind == "wordpiece":
        return _word_pieces(documents, vocab_size, special, unknown, lowercase)
    if kind in ("bpe", "unigram"):
        inner = tokenizers.Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if kind == "bpe":
            trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
        else:
            trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token=unknown, **common)
    else:
        inner = tokenizers.Tokenizer(models.WordLevel(unk_token=unknown))
        if lowercase:
            inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    texts = _checked(documents)
    train_from_texts(inner, _with_short_words(texts) if kind == "bpe" else texts, trainer)
    return inner


def _with_short_words(documents: Iterable[str]) -> Iterator[str]:
    """The documents, cut within runs of more than :data:`WORD` characters."""
    for document in documents:
        begin = 0
        for run in LONG_RUN.finditer(document):
            for cut in range(run.start() + WORD, run.end(), WORD):
                yield document[begin:cut]
                begin = cut
        yield document[begin:]


def _checked(documents: Iterable[str]) -> Iterator[str]:
    """The documents; without any text a trainer would panic or return a tokenizer of nothing."""
    empty = True
    for document in documents:
        if not isinstance(document, str):
            raise InputError(f"documents: expected texts, got {type(document).__name__}")
        empty = empty and not document.strip()
        yield document
    if empty:
        raise InputError("documents: no text to train a tokenizer on")


def _word_pieces(
    documents: Iterable[str], vocab_size: int, special: list[str], unknown: str | None, lowercase: bool
) -> tokenizers.Tokenizer:
    """BERT's. The trainer numbers ``##x`` in the order of a hash table; as special tokens they get fixed numbers."""
    documents = list(documents) if isinstance(documents, Iterator) else documents
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    counts: Counter[str] = Counter()
    for document in _checked(documents):
        counts.update(normalizer.normalize_str(document))
    characters = [c for c in sorted(counts, key=lambda c: (-counts[c], c)) if not c.isspace()]
    # At least half of the vocabulary is for pieces of several characters.
    alphabet = sorted(characters[: max(1, (vocab_size - len(special)) // 4)])

    def new(model: models.WordPiece) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer(model)
        inner.normalizer = normalizer
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        return inner

    training = new(models.WordPiece(unk_token=unknown))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"##{c}" for c in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    train_from_texts(training, _with_short_words(documents), trainer)
    inner = new(models.WordPiece(vocab=training.get_vocab(with_added_tokens=True), unk_token=unknown))
    inner.add_special_tokens(special)
    return inner


def _characters(documents: Iterable[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """BPE without a merge: single characters, and bytes for those that are not in the vocabulary."""
    counts: Counter[str] = Counter()
    for document in _checked(documents):
        counts.update(document)
    vocabulary: dict[str, int] = {}
    for name in (*special, *(f"<0x{byte:02X}>" for byte in range(BYTES))):
        vocabulary.setdefault(name, len(vocabulary))
    for character in sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - len(vocabulary)]:
        vocabulary.setdefault(character, len(vocabulary))
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{RUN}}}"), "isolated")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(special)
    return inner
