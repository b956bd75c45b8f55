"""Corpus, split, tokenizer, token files."""

import json
import lzma
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prose import WORDS, prose

from fastllm.config import InputError
from fastllm.data import (
    Corpus,
    DataConfig,
    Tokenizer,
    default_corpus,
    load_corpus,
    load_dataset,
    open_dataset,
    open_token_file,
    prepare,
    read_corpus,
    write_token_file,
    xz_bits_per_byte,
)
from fastllm.data.corpus import deduplicate, split_documents
from fastllm.data.tokenizer import PIECE


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([prose(50)], 300)


def test_default_corpus_is_every_topic_once_with_every_tenth_held_out():
    from pydoc_data.topics import topics

    corpus = default_corpus()
    names = sorted(topics)
    seen, documents = set(), []
    for name in names:
        kept = []
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
        documents.append("\n\n".join(kept))
    assert corpus.validation == [d for i, d in enumerate(documents) if i % 10 == 9 and d]
    assert corpus.train == [d for i, d in enumerate(documents) if i % 10 != 9 and d]


def test_no_paragraph_of_the_training_text_is_held_out():
    corpus = default_corpus()
    train = {p.strip() for d in corpus.train for p in d.split("\n\n")}
    assert not train & {p.strip() for d in corpus.validation for p in d.split("\n\n")}


def test_deduplicate_compares_paragraphs_stripped_and_keeps_the_first():
    documents, removed = deduplicate(["a\n\nb", "  a \n\nc\n\n\n\nc", "b"])
    assert documents == ["a\n\nb", "c", ""]
    assert removed == 3


def test_a_document_left_empty_still_counts_for_the_split():
    train, validation, _ = split_documents([str(i) if i != 3 else "" for i in range(21)])
    assert validation == ["9", "19"]
    assert len(train) == 18


def test_a_single_document_is_split_at_a_paragraph_near_its_last_tenth():
    text = prose(200)
    (head,), (tail,), _ = split_documents([text])
    assert head + "\n\n" + tail == text
    assert 0.08 < len(tail) / len(text) < 0.12


def test_without_paragraphs_the_split_is_at_a_line_and_without_lines_at_a_character():
    (head,), (tail,), _ = split_documents(["\n".join(WORDS * 3)])
    assert head + "\n" + tail == "\n".join(WORDS * 3)
    (head,), (tail,), _ = split_documents(["x" * 100])
    assert (len(head), len(tail)) == (90, 10)


def test_folders_are_read_in_order_of_their_paths_and_say_what_they_pass_over(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text(prose(3, i))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("secret")
    corpus = read_corpus([tmp_path])
    assert corpus.validation == [prose(3, 9)]
    assert corpus.train == [prose(3, i) for i in range(12) if i != 9]
    assert "2 files skipped" in corpus.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"text\0more", "binary file.*offset 4"),
        (b"caf\xe9 au lait", "not UTF-8.*offset 3"),
        (None, "No such file"),
    ],
)
def test_a_named_file_that_is_no_text_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"given.txt: .*{message}"):
        read_corpus([path])


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"no text file.*a\.bin"):
        read_corpus([tmp_path])


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + prose(30).replace("\n", "\r\n").encode())
    assert read_corpus([tmp_path / "dos.txt"]).train[0] in prose(30)


def test_xz_line_is_what_the_validation_text_adds_to_the_compressed_training_text():
    corpus = Corpus("c", [prose(40, 1), prose(40, 2)], [prose(20, 3), prose(3, 4)])
    train = "".join(d + "\n" for d in corpus.train).encode()
    both = train + "\n".join(corpus.validation).encode()
    extra = len(lzma.compress(both, preset=9)) - len(lzma.compress(train, preset=9))
    assert xz_bits_per_byte(corpus) == pytest.approx(8 * extra / (len(both) - len(train)))
    assert 1.0 < xz_bits_per_byte(default_corpus()) < 2.5


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_encoding_and_streaming(text):
    tokenizer = _shared_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.end_of_text not in ids


def _shared_tokenizer(cache=[]):  # noqa: B006, hypothesis takes no fixtures of module scope without a warning
    if not cache:
        cache.append(Tokenizer.train([prose(50)], 300))
    return cache[0]


def test_the_end_of_text_mark_in_a_text_is_just_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_training_a_tokenizer_is_deterministic_and_other_text_gives_another():
    corpus = default_corpus()
    first, second = (Tokenizer.train(corpus.train, 1024).fingerprint for _ in range(2))
    assert first == second
    assert Tokenizer.train(corpus.train[1:], 1024).fingerprint != first


def test_the_tokenizer_never_sees_the_validation_text(tmp_path):
    a = prepare(Corpus("a", [prose(40)], [prose(4, 1)]), tmp_path / "a", vocab_size=400)
    b = prepare(Corpus("b", [prose(40)], ["zyzzyva " * 500]), tmp_path / "b", vocab_size=400)
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint


def test_long_texts_are_encoded_in_pieces_to_the_same_tokens():
    text = prose(1)
    while len(text) < 2.5 * PIECE:
        text += "\n\n\n" + prose(300, len(text)) + "\n\n    indented\n\nline\n"
    tokenizer = _shared_tokenizer()
    assert tokenizer.encode(text) == tokenizer._inner.encode(text).ids


def test_a_saved_tokenizer_is_the_same_however_its_file_is_laid_out(tokenizer, tmp_path):
    import json

    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_too_small_a_vocabulary_and_a_file_that_is_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(InputError, match="vocab_size: expected at least 257"):
        Tokenizer.train(["a"], 256)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.load(tmp_path / "none.json")


def test_numpy_alone_can_read_a_token_file(tokenizer, tmp_path):
    documents = [prose(3, 1), prose(2, 2)]
    write_token_file(tmp_path / "t.bin", documents, tokenizer)
    expected = [0]
    for document in documents:
        expected += [*tokenizer.encode(document), 0]
    assert np.memmap(tmp_path / "t.bin", "<u2", mode="r", offset=256, shape=len(expected)).tolist() == expected
    opened = open_token_file(tmp_path / "t.bin", tokenizer)
    assert (opened.documents, opened.bytes) == (2, sum(len(d.encode()) for d in documents))
    assert opened.vocab_size == tokenizer.vocab_size
    assert isinstance(opened.tokens, np.memmap)


def test_vocabularies_beyond_16_bits_take_32(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", (1 << 16) + 1)
    write_token_file(tmp_path / "t.bin", ["abc"], tokenizer)
    assert open_token_file(tmp_path / "t.bin", tokenizer).tokens.dtype == np.dtype("<u4")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "damaged token file: .* bytes expected"),
        (lambda b: b + b"\0", "damaged token file: .* bytes expected"),
        (lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:], "SHA-256"),
        (lambda b: b[:100], "not a token file"),
        (lambda b: b"GIF89a" + b[6:], "not a token file"),
        (lambda b: b[:8] + b"\1" + b[9:], "version 1"),
        (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], "SHA-256"),
        (lambda b: b[:24] + b"\xff" * 8 + b[32:], "bytes expected"),
        (lambda b: b[:112] + b"\1" + b[113:], "bytes expected"),
        (lambda b: b"", "not a token file"),
        (lambda b: b[:16] + bytes([b[16] ^ 1]) + b[17:], "header"),
        (lambda b: b[:41] + bytes([b[41] ^ 8]) + b[42:], "header"),
    ],
)
def test_a_damaged_token_file_is_refused_by_name(tokenizer, tmp_path, damage, message):
    path = tmp_path / "t.bin"
    write_token_file(path, [prose(5)], tokenizer)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"t\.bin: .*{message}"):
        open_token_file(path, tokenizer)


def test_a_token_file_of_another_tokenizer_is_refused(tokenizer, tmp_path):
    write_token_file(tmp_path / "t.bin", [prose(5)], tokenizer)
    with pytest.raises(InputError, match=r"t\.bin: made with another tokenizer"):
        open_token_file(tmp_path / "t.bin", Tokenizer.train([prose(50, 7)], 299))


def test_a_failed_write_leaves_nothing_behind(tokenizer, tmp_path):
    def documents():
        yield prose(3)
        raise RuntimeError

    write_token_file(tmp_path / "t.bin", ["before"], tokenizer)
    before = (tmp_path / "t.bin").read_bytes()
    with pytest.raises(RuntimeError):
        write_token_file(tmp_path / "t.bin", documents(), tokenizer)
    assert (tmp_path / "t.bin").read_bytes() == before
    assert os.listdir(tmp_path) == ["t.bin"]


def test_a_prepared_folder_is_used_again_for_the_same_text_and_made_anew_for_another(tmp_path):
    corpus = Corpus("c", [prose(60)], [prose(6, 1)])
    first = prepare(corpus, tmp_path, vocab_size=300)
    stamp = (tmp_path / "train-00000.bin").stat().st_mtime_ns
    again = prepare(corpus, tmp_path, vocab_size=300)
    assert (tmp_path / "train-00000.bin").stat().st_mtime_ns == stamp
    assert again.summary == first.summary
    other = prepare(Corpus("c", [prose(61)], [prose(6, 1)]), tmp_path, vocab_size=300)
    assert other.train.sha256 != first.train.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "train: expected a list of texts, got None"),
        ({"validation": []}, "validation: expected the name of a token file"),
        ({"notes": [1]}, "notes: expected a list of texts"),
        ({"xz_bits_per_byte": "2"}, "xz_bits_per_byte: expected a number or null"),
        ({"name": 3}, "name: expected a text"),
        ("[" * 100_000, "recursion"),
        ({"folder": "."}, "recursion"),
    ],
)
def test_a_summary_that_is_none_is_refused_by_name(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    prepare(Corpus("test", ["abc " * 50], ["abc"]), tmp_path, vocab_size=300)
    summary = tmp_path / "corpus.json"
    content = json.loads(summary.read_text())
    summary.write_text(change if isinstance(change, str) else json.dumps({**content, **change}))
    with pytest.raises(InputError, match=rf"corpus\.json: damaged: .*{message}"):
        open_dataset(".")


def test_a_damaged_prepared_folder_is_mended_by_prepare_and_refused_by_open(tmp_path):
    corpus = Corpus("c", [prose(60)], [prose(6, 1)])
    good = prepare(corpus, tmp_path, vocab_size=300)
    content = (tmp_path / "validation-00000.bin").read_bytes()
    (tmp_path / "validation-00000.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"validation-00000\.bin: damaged"):
        open_dataset(tmp_path)
    assert prepare(corpus, tmp_path, vocab_size=300).validation.sha256 == good.validation.sha256


def test_swapped_tokens_and_a_swapped_tokenizer_are_refused(tmp_path):
    a = prepare(Corpus("a", [prose(60)], [prose(6, 1)]), tmp_path / "a", vocab_size=300)
    prepare(Corpus("b", [prose(60, 5)], [prose(6, 6)]), tmp_path / "b", vocab_size=290, tokenizer=a.tokenizer)
    (tmp_path / "a" / "train-00000.bin").write_bytes((tmp_path / "b" / "train-00000.bin").read_bytes())
    with pytest.raises(InputError, match=r"train-00000\.bin: not the tokens"):
        open_dataset(tmp_path / "a")
    Tokenizer.train([prose(9, 9)], 280).save(tmp_path / "b" / "tokenizer.json")
    with pytest.raises(InputError, match=r"train-00000\.bin: made with another tokenizer"):
        open_dataset(tmp_path / "b")


def test_load_corpus_takes_the_configs_paths(tmp_path):
    (tmp_path / "t.txt").write_text(prose(30) + "\n\n" + prose(30))
    assert len(load_corpus(DataConfig(data=(str(tmp_path / "t.txt"),))).train[0]) < len(
        load_corpus(DataConfig(data=(str(tmp_path / "t.txt"),), deduplicate=False)).train[0]
    )
    assert load_corpus(DataConfig()).name == "pydoc_data.topics"


def test_held_out_text_is_scored_on_and_all_of_the_data_is_trained_on(tmp_path):
    new, both = "A paragraph of its own.", prose(30).split("\n\n")[0]
    (tmp_path / "t.txt").write_text(prose(30))
    (tmp_path / "v.txt").write_text(f"{both}\n\n{new}")
    train, held_out = DataConfig(data=(str(tmp_path / "t.txt"),)), [str(tmp_path / "v.txt")]
    dataset = load_dataset(train, tmp_path / "run", vocab_size=300, held_out=held_out)
    assert dataset.validation.bytes == len(new)
    assert dataset.train.bytes == len("\n\n".join(dict.fromkeys(prose(30).split("\n\n"))))
    kept = load_corpus(replace(train, deduplicate=False), held_out)
    assert (kept.train, kept.validation) == ([prose(30)], [f"{both}\n\n{new}"])
    assert "the text to score on is given" in dataset.describe()


def test_held_out_text_is_refused_where_there_is_a_split_or_nothing_is_left_of_it(tmp_path):
    (tmp_path / "t.txt").write_text(prose(30))
    text = str(tmp_path / "t.txt")
    with pytest.raises(InputError, match="held_out: each of its paragraphs is in the training text"):
        load_corpus(DataConfig(data=(text,)), [text])
    with pytest.raises(InputError, match="held_out: needs data"):
        load_corpus(DataConfig(), [text])
    load_dataset(DataConfig(data=(text,)), tmp_path / "tokens", vocab_size=300)
    with pytest.raises(InputError, match=r"held_out: .*tokens that are split already"):
        load_dataset(DataConfig(data=(str(tmp_path / "tokens"),)), tmp_path / "run", vocab_size=300, held_out=[text])
