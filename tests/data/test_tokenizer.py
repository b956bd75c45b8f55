"""The five kinds of tokenizer, their special tokens, transformers reading them, and sentences."""

import itertools
import json
import os
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from prose import prose

from fastllm.cli import main
from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.data.sentences import sentence_starts
from fastllm.data.tokenizer import END_OF_TEXT, KINDS, SPECIAL_TOKENS
from fastllm.data.tokenizer_training import WORD, _with_short_words
from fastllm.training.objectives.masked import Pieces

LOSSLESS = ("bpe", "unigram", "char")
TRAINING = [
    prose(30),
    "Ein Käfer saß da. 日本語の文です。\n\n    indented(code)\t# β → δ\r\n" * 5,
    "naïve café — “quoted”",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["the ", "fox", "\n\n", " ", "日本", "ß", "<|endoftext|>", "[MASK]", "##a", "▁", "<0x41>", "Ġ", "\x00", "é"]
    )
).map("".join)


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train(TRAINING, 400, kind, special_tokens=SPECIAL_TOKENS["all"]) for kind in KINDS}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_any_text_comes_back(trained, kind):
    tokenizer = trained[kind]

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    check()


@pytest.mark.parametrize("kind", ["word", "wordpiece"])
def test_known_words_come_back_up_to_white_space_and_unknown_ones_are_unk(trained, kind):
    tokenizer = trained[kind]
    words = sorted(set(TRAINING[0].replace(".", " ").split()))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(words), min_size=1))
    def check(chosen):
        ids = tokenizer.encode("  ".join(chosen))
        assert tokenizer.decode(ids) == " ".join(chosen)

    check()
    assert tokenizer.encode("\u0416\u0416") == [tokenizer.special("unk")]

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def never_special(text):
        assert not set(tokenizer.encode(text)) & (set(tokenizer.special_tokens.values()) - {tokenizer.special("unk")})

    never_special()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_equal_ids(trained, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained[kind]
    tokenizer.save_pretrained(tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    from_file = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        for theirs in (ours, from_file):
            assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert ours.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)

    check()
    assert len(ours) == tokenizer.vocab_size
    assert (ours.mask_token_id, ours.cls_token_id, ours.sep_token_id, ours.pad_token_id) == tuple(
        tokenizer.special(role) for role in ("mask", "cls", "sep", "pad")
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_training_is_repeatable(trained, kind):
    again = Tokenizer.train(iter(TRAINING), 400, kind, special_tokens=SPECIAL_TOKENS["all"])
    assert again.fingerprint == trained[kind].fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizers_are_the_same(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_tokens == tokenizer.special_tokens
    assert [loaded.token(i) for i in range(len(SPECIAL_TOKENS["all"]))] == list(SPECIAL_TOKENS["all"])
    assert tokenizer.vocab_size <= 400
    assert tokenizer.end_of_text == 0


@pytest.mark.parametrize("kind", KINDS)
def test_batches_encode_as_single_texts_do_and_mark_sentences(trained, kind):
    tokenizer = trained[kind]
    texts = [*TRAINING, "", " \n", "One. Two.  Three", "a" * 300, "日本語。日本語。"]
    for text, (ids, starts) in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text)
        assert np.all(np.diff(starts) > 0)
        bounds = [*sentence_starts(text), len(text)]
        sentences = [text[a:b].strip() for a, b in itertools.pairwise(bounds)]
        assert len(starts) == len(sentences)
        if kind in LOSSLESS:
            ends = [*starts[1:].tolist(), len(ids)] if len(starts) else []
            parts = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, ends, strict=True)]
            assert parts == sentences


def test_the_objectives_special_tokens_have_their_roles(trained):
    causal = Tokenizer.train(TRAINING, 300)
    assert causal.special_tokens == {"bos": 0, "eos": 0}
    with pytest.raises(InputError, match=r"no mask token; .*--objective masked"):
        causal.special("mask")
    seq2seq = Tokenizer.train(TRAINING, 300, special_tokens=SPECIAL_TOKENS["seq2seq"])
    assert seq2seq.special_tokens == {"pad": 1, "unk": 2, "bos": 3, "eos": 4}
    assert Tokenizer.train(TRAINING, 100, "word").special_tokens == {"unk": 1, "bos": 0, "eos": 0}


def test_lower_case_is_asked_for(trained):
    lower = Tokenizer.train(TRAINING, 400, "wordpiece", lowercase=True)
    assert lower.encode("THE Fox") == lower.encode("the fox")
    assert lower.decode(lower.encode("Käfer")) == "kafer"
    with pytest.raises(InputError, match="lowercase: only a wordpiece or word"):
        Tokenizer.train(TRAINING, 400, "bpe", lowercase=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(vocab_size=256), "vocab_size: expected at least 257"),
        (dict(vocab_size=257, kind="char", special_tokens=("a", "b")), "vocab_size: expected at least 258"),
        (dict(vocab_size=2, kind="word"), "vocab_size: expected at least 3"),
        (dict(vocab_size=300, kind="bytes"), "kind: expected one of bpe"),
        (dict(vocab_size=300, special_tokens=()), "special_tokens"),
        (dict(vocab_size=300, special_tokens=("a", "a")), "special_tokens"),
        (dict(vocab_size=300, documents=[]), "documents: no text"),
        (dict(vocab_size=300, kind="word", documents=["", " \n"]), "documents: no text"),
        (dict(vocab_size=300, kind="char", documents=[]), "documents: no text"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.train(arguments.pop("documents", TRAINING), **arguments)


def test_a_tokenizer_of_other_makers_takes_its_own_separator(tmp_path, trained):
    definition = json.loads(trained["wordpiece"].definition)
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != END_OF_TEXT]
    del definition["model"]["vocab"][END_OF_TEXT]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.end_of_text == loaded.special("eos")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("One.", ["One."]),
        ("One. Two! Three? four", ["One.", "Two!", "Three? four"]),
        ("Dr. W. met J. Doe at 3.14 p.m. today. He left.", ["Dr. W. met J. Doe at 3.14 p.m. today.", "He left."]),
        ("A title\n\nsome text. \u201cQuoted.\u201d More", ["A title", "some text.", "\u201cQuoted.\u201d", "More"]),
        ("これは文です。次の文!", ["これは文です。", "次の文!"]),
        ("It was I. They came.", ["It was I.", "They came."]),
        ("Ends with etc.\n\nNew paragraph", ["Ends with etc.", "New paragraph"]),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    bounds = [*sentence_starts(text), len(text)]
    assert [text[a:b].strip() for a, b in itertools.pairwise(bounds)] == expected


def _byte_level(pre_tokenizer, normalizer=None, *added):
    """One that somebody else trained: BPE over bytes after these steps."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    inner.train_from_iterator(TRAINING, trainer)
    inner.add_tokens(list(added))
    return inner


@pytest.mark.parametrize(
    ("splitter", "normalizer", "added"),
    [
        ({"add_prefix_space": False}, None, []),
        ({"add_prefix_space": True}, None, []),
        ({"add_prefix_space": False, "use_regex": False}, None, []),
        ({"add_prefix_space": False}, tokenizers.normalizers.Prepend("x"), []),
        ({"add_prefix_space": False}, tokenizers.normalizers.Replace("\n\n", "Q"), []),
        ({"add_prefix_space": False}, None, ["\n\nThe quick"]),
        ({"add_prefix_space": False}, None, [tokenizers.AddedToken("fox", rstrip=True)]),
    ],
)
def test_a_long_text_has_the_tokens_of_the_whole_with_anybodys_tokenizer(splitter, normalizer, added, monkeypatch):
    monkeypatch.setattr("fastllm.data.tokenizer.PIECE", 20)
    inner = _byte_level(tokenizers.pre_tokenizers.ByteLevel(**splitter), normalizer, *added)
    tokenizer = Tokenizer(inner.to_str())
    text = "The quick brown fox\n\nThe quick brown fox\n\n" * 4 + "end"
    expected = inner.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_batch([text])[0][0].tolist() == expected


def test_bytes_of_tokens_whose_text_is_split_by_a_pattern_first():
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\s+| ?[^\s\p{L}]+"), "isolated")
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner = _byte_level(tokenizers.pre_tokenizers.Sequence([split, bytes_]))
    definition = json.loads(inner.to_str())
    definition["model"]["vocab"]["no bytes"] = 500  # spelt otherwise, after ids that no token has
    tokenizer = Tokenizer(json.dumps(definition))
    text = "the fox \u65e5\u672c quickly"
    ids = np.array(tokenizer.encode(text))
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert Pieces(tokenizer).words(ids)[-1] == 3
    assert (tokenizer.vocab_size, tokenizer.token_bytes(500)) == (501, b"no bytes")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_trainer_of_merges_sees_no_word_that_takes_it_for_ever(kind):
    """The time of its merges grows with the square of a word's length: a line of a megabyte took minutes."""
    words = "the words around it"
    tokenizer = Tokenizer.train([f"{words} {'x' * 5000} {words}", words], 300, kind)
    longest = max(len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size))
    assert 256 <= longest <= WORD + 1  # a space before it belongs to a word
    assert tokenizer.decode(tokenizer.encode(words)) == words


@pytest.mark.parametrize("run", ["x", " ", "\u3042", "ab"])
def test_documents_are_cut_within_long_runs_alone(run):
    text = f"before {run * 3000}\nafter {'y' * WORD} {'z' * (WORD + 1)}"
    pieces = list(_with_short_words([text, "short", ""]))
    assert "".join(pieces) == text + "short"
    assert pieces[-2:] == ["short", ""]
    assert max(len(found) for piece in pieces for found in re.findall(r"\S+|\s+", piece)) == WORD
    assert pieces[-3] == "z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "train", "--vocab-size", "10"], "vocab_size: expected at least 257"),
        (["tokenizer", "train", "--vocab-size", "2", "--kind", "word"], "vocab_size: expected at least 3"),
        (["tokenizer", "train", "--lowercase"], "lowercase: only a wordpiece or word tokenizer"),
        (["tokenizer", "encode", "--tokenizer", "none.json"], "none.json: No such file"),
        (["train", "--vocab-size", "10"], "vocab_size: expected at least 257"),
        (["train", "--objective", "classify", "--vocab-size", "5", "--tokenizer-kind", "word"], "vocab_size: expected"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_refused_before_the_text_is_read(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for place in ("commands.tokenizer.load_corpus", "data.dataset.load_corpus", "training.setup.read_examples"):
        monkeypatch.setattr(f"fastllm.{place}", lambda *args, **kwargs: pytest.fail("read"))
    source = ["--data", "text.txt"] if arguments[0] == "train" else ["text.txt"]
    assert main([*arguments, *source, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == []


@pytest.mark.parametrize("text", [None, 1, b"a", ["a"]])
def test_what_is_no_text_is_named(text):
    tokenizer = Tokenizer.train(["a b"], 300)
    for encode in (
        tokenizer.encode, tokenizer.encode_template, tokenizer.encode_with_offsets,
        lambda text: tokenizer.encode_batch([text]),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"text must be a str, got {type(text).__name__}"):
            encode(text)
