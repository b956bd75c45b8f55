"""Which documents repeat others: clusters beside plain loops over all pairs, whatever the shards and slices."""

import itertools

import numpy as np
import pytest

from fastllm.data.clean.minhash import BANDS, ROWS, SIZE, band_keys
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


def copies(generator, count):
    """Signatures of which most are an earlier one with some values changed, or lie between two earlier ones."""
    signatures = random_signatures(generator, count)
    for number in range(1, count):
        kind, (own, other) = generator.random(), signatures[generator.integers(number, size=2)].copy()
        if kind < 0.4:
            place = generator.permutation(SIZE)[: generator.integers(SIZE // 3)]
            own[place] = signatures[number, place]
        elif kind < 0.6:  # all bands but the first are changed
            own[ROWS::ROWS] = signatures[number, ROWS::ROWS]
        elif kind < 0.8:
            own[SIZE // 2 :] = other[SIZE // 2 :]
        else:
            own = signatures[number]
        signatures[number] = own
    return signatures


def near_pairs(signatures):
    """Of each band's documents those that are like its first one, or else like the one before."""

    def alike(a, b):
        return np.count_nonzero(signatures[a] == signatures[b]) >= 0.75 * SIZE

    for band in range(BANDS):
        groups = {}
        for number, values in enumerate(signatures[:, band * ROWS : (band + 1) * ROWS]):
            groups.setdefault(values.tobytes(), []).append(number)
        for group in groups.values():
            for before, number in itertools.pairwise(group):
                for other in (group[0], before):
                    if alike(other, number):
                        yield other, number
                        break


@pytest.mark.parametrize("size", [1 << 22, 7])
@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_like_the_first_or_the_one_before_them_in_a_band(tmp_path, monkeypatch, seed, size):
    monkeypatch.setattr(duplicates, "SLICE", size)
    generator = np.random.default_rng(seed)
    signatures = copies(generator, 60)
    keys = generator.integers(0, 1 << 64, (60, 2), np.uint64)
    write(tmp_path, keys, signatures, 2)
    found = find_duplicates(tmp_path, True, 0.75)
    assert found.first.tolist() == first_of_each(60, list(near_pairs(signatures)))
    assert 10 < len(set(found.first.tolist())) < 50
    assert not found.exact.any()
    assert find_duplicates(tmp_path, False, 0.75).first.tolist() == list(range(60))


def test_a_share_of_equal_values_that_is_the_similarity_is_enough(tmp_path):
    signatures = random_signatures(np.random.default_rng(0), 4)
    for number, equal in ((1, SIZE * 3 // 4), (3, SIZE * 3 // 4 - 1)):
        signatures[number, :equal] = signatures[number - 1, :equal]
    write(tmp_path, np.arange(8, dtype=np.uint64).reshape(4, 2), signatures, 1)
    assert find_duplicates(tmp_path, True, 0.75).first.tolist() == [0, 0, 2, 3]
