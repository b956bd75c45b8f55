"""Several token files read as one."""

import re
from pathlib import Path

import numpy as np
import pytest
from prose import prose

from fastllm.config import InputError
from fastllm.data import Batches, Corpus, Tokenizer, open_dataset, open_token_file, prepare, write_token_file
from fastllm.data.token_file import TokenWriter
from fastllm.data.token_shards import Concatenated, write_token_shards

DOCUMENTS = [prose(3, i) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCUMENTS, 300)


@pytest.fixture
def sharded(tokenizer, tmp_path):
    corpus = Corpus("c", DOCUMENTS, [prose(20, 99)])
    return prepare(corpus, tmp_path / "sharded", tokenizer=tokenizer, shard_tokens=400), tmp_path / "sharded"


def test_shards_read_as_the_single_file_does(sharded, tokenizer, tmp_path):
    write_token_file(tmp_path / "t.bin", DOCUMENTS, tokenizer)
    single = open_token_file(tmp_path / "t.bin", tokenizer)
    dataset, folder = sharded
    several = dataset.train
    assert len(list(folder.glob("train-*.bin"))) > 5
    assert (several.sha256, several.documents, several.bytes) == (single.sha256, single.documents, single.bytes)
    for name in ("tokens", "document_starts", "sentence_starts"):
        ours, theirs = getattr(several, name), getattr(single, name)
        assert isinstance(ours, Concatenated)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(np.asarray(ours), theirs)
        assert list(ours) == theirs.tolist()
    draw = np.random.default_rng(0)
    n = len(single)
    for index in (0, -1, n - 1, slice(None), slice(300, 900), slice(5, 5), slice(-7, None), slice(0, n, 7)):
        assert np.array_equal(several.tokens[index], single.tokens[index])
    index = draw.integers(-n, n, (7, 33))
    assert np.array_equal(several.tokens[index], single.tokens[index])
    values = draw.integers(0, n, 50)
    for side in ("left", "right"):
        assert np.array_equal(
            np.searchsorted(several.document_starts, values, side),
            np.searchsorted(single.document_starts, values, side),
        )
        assert np.searchsorted(several.sentence_starts, 0, side) == np.searchsorted(single.sentence_starts, 0, side)
    for step in range(3):
        for a, b in zip(Batches(several, 64, 4, 0)(step), Batches(single, 64, 4, 0)(step), strict=True):
            assert np.array_equal(a, b)


def test_an_index_out_of_range_or_of_another_kind_is_refused(sharded):
    tokens = sharded[0].train.tokens
    for index in (len(tokens), -len(tokens) - 1, np.array([0, len(tokens)])):
        with pytest.raises(IndexError, match="out of range"):
            tokens[index]
    with pytest.raises(TypeError, match="expected integers"):
        tokens[np.array([True, False])]


def test_starts_are_where_documents_and_sentences_begin(sharded, tokenizer):
    train = sharded[0].train
    starts = train.document_starts[:]
    assert starts[0] == 1
    for start, following, document in zip(starts, [*starts[1:], len(train)], DOCUMENTS, strict=True):
        assert train.tokens[int(start) - 1] == tokenizer.end_of_text
        assert tokenizer.decode(train.tokens[int(start) : int(following)]) == document
    sentences = train.sentence_starts[:]
    assert set(starts.tolist()) <= set(sentences.tolist())
    assert len(sentences) == sum(len(d.split("\n\n")) for d in DOCUMENTS)


def test_a_shard_lost_damaged_or_in_another_place_is_refused(sharded):
    _, folder = sharded
    first, second = (folder / f"train-0000{i}.bin" for i in range(2))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"train-00001\.bin: shard 0, expected shard 1"):
        open_dataset(folder)
    second.unlink()
    with pytest.raises(InputError, match=r"train-00001\.bin: No such file"):
        open_dataset(folder)
    second.write_bytes(kept)
    open_dataset(folder)


def test_fewer_shards_leave_none_of_the_earlier_ones(sharded, tokenizer):
    _, folder = sharded
    prepare(Corpus("c", DOCUMENTS[:3], [prose(20, 99)]), folder, tokenizer=tokenizer)
    assert [path.name for path in folder.glob("train-*.bin")] == ["train-00000.bin"]
    assert open_dataset(folder).train.documents == 3


def test_a_shard_ends_with_the_document_that_reaches_its_size(tokenizer, tmp_path):
    tokens = len(tokenizer.encode(DOCUMENTS[0])) + 1  # and the end of text
    names, _ = write_token_shards(tmp_path, "train", [DOCUMENTS[0]] * 3, tokenizer, shard_tokens=tokens)
    shards = [open_token_file(tmp_path / name, tokenizer, number) for number, name in enumerate(names)]
    # The first one also begins with an end of text.
    assert [(len(shard), shard.documents) for shard in shards] == [(tokens + 1, 1), (tokens, 1), (tokens, 1)]


def test_a_file_without_tokens_is_refused(tokenizer, tmp_path):
    with TokenWriter(tmp_path / "t.bin", tokenizer, shard=1):
        pass
    with pytest.raises(InputError, match=r"t\.bin: damaged token file"):
        open_token_file(tmp_path / "t.bin", tokenizer, shard=1)


def test_documents_without_text_keep_their_place(tokenizer, tmp_path):
    write_token_file(tmp_path / "t.bin", ["", "a. B", ""], tokenizer)
    opened = open_token_file(tmp_path / "t.bin", tokenizer)
    assert opened.document_starts.tolist()[:2] == [1, 2]
    assert opened.documents == 3
    assert len(opened.sentence_starts) == 2


def test_the_documented_lines_of_numpy_read_a_shard(sharded):
    dataset, folder = sharded
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    block, count = re.subn(r"^path = .*\n", "", block, flags=re.MULTILINE)
    assert count == 1
    read = []
    for path in sorted(folder.glob("train-*.bin")):
        names = {"path": path}
        exec(block, names)
        read.append(names)
    assert np.array_equal(np.concatenate([names["ids"] for names in read]), np.asarray(dataset.train.tokens))
    assert sum(len(names["document_starts"]) for names in read) == dataset.train.documents
    assert sum(len(names["sentence_starts"]) for names in read) == len(dataset.train.sentence_starts)
