"""Which documents repeat others: clusters beside plain loops over all pairs, whatever the shards and slices."""

import numpy as np
import pytest

from fastllm.data.clean.minhash import BANDS, SIZE, band_keys
from fastllm.data.pipeline import duplicates
from fastllm.data.pipeline.duplicates import find_duplicates


def write(work, keys, signatures, shards):
    """The arrays of documents, cut into ``shards``."""
    bands = band_keys(signatures).reshape(-1, BANDS)
    for number, part in enumerate(np.array_split(np.arange(len(keys)), shards)):
        np.save(work / f"key-{number:05d}.npy", keys[part])
        np.save(work / f"signature-{number:05d}.npy", signatures[part])
        np.save(work / f"band-{number:05d}.npy", np.ascontiguousarray(bands[part].T))


def first_of_each(count, pairs):
    """The smallest number that each document is joined to, by way of others too."""
    first = np.arange(count)
    for _ in range(count):
        for a, b in pairs:
            first[[a, b]] = first[[a, b]].min()
    return first.tolist()


def random_signatures(generator, count):
    return generator.integers(0, 1 << 32, (count, SIZE), np.uint32)


@pytest.mark.parametrize("size", [1 << 22, 7])
@pytest.mark.parametrize("shards", [1, 3])
def test_exact_duplicates_are_those_with_the_same_key(tmp_path, monkeypatch, shards, size):
    monkeypatch.setattr(duplicates, "SLICE", size)
    generator = np.random.default_rng(0)
    # The least and the greatest key too, and keys that agree in their first half alone.
    keys = np.array([0, 1, 1 << 63, (1 << 64) - 1], np.uint64)[generator.integers(0, 4, (40, 2))]
    write(tmp_path, keys, random_signatures(generator, 40), shards)
    found = find_duplicates(tmp_path, False, 0.75)
    same = [(a, b) for b in range(40) for a in range(b) if (keys[a] == keys[b]).all()]
    expected = first_of_each(40, same)
    assert found.first.tolist() == expected
    assert found.exact.tolist() == [first != number for number, first in enumerate(expected)]
    assert found.repeated() == {first for number, first in enumerate(expected) if first != number}
    kept = np.concatenate([found.kept(shard) for shard in range(shards)])
    assert kept.tolist() == [first == number for number, first in enumerate(expected)]


@pytest.mark.parametrize("size", [1 << 22, 3])
def test_near_duplicates_are_like_the_first_or_the_one_before_them_in_a_band(tmp_path, monkeypatch, size):
    monkeypatch.setattr(duplicates, "SLICE", size)
    generator = np.random.default_rng(0)
    signatures = random_signatures(generator, 6)
    width = SIZE // BANDS
    signatures[:4, :width] = signatures[0, :width]  # the first four have a band in common
    signatures[2, : SIZE * 3 // 4] = signatures[1, : SIZE * 3 // 4]  # just similar to the one before it
    signatures[3, : SIZE * 3 // 4 - 1] = signatures[0, : SIZE * 3 // 4 - 1]  # one value short of the first
    signatures[5, width:] = signatures[4, width:]  # very similar, and alike in all bands but one
    keys = generator.integers(0, 1 << 64, (6, 2), np.uint64)
    write(tmp_path, keys, signatures, 2)
    found = find_duplicates(tmp_path, True, 0.75)
    assert found.first.tolist() == [0, 1, 1, 3, 4, 4]
    assert not found.exact.any()
    assert find_duplicates(tmp_path, False, 0.75).first.tolist() == list(range(6))
