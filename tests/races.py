"""Finds what results owe to the order of programs: in the interpreter a launch runs its programs in a random one.

``with find_races(seed) as races:`` lists every launch in which two programs write one address, or one reads what
another writes. Atomic operations count as neither: they are for that.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class _Launch:
    """The accesses of one launch: for each, the program's number and the addresses whose mask is true."""

    order: list[int]
    program: int = -1
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)


@dataclass
class Races:
    """What was found: a line for each launch with a conflict; and how many launches of several programs there were."""

    found: list[str] = field(default_factory=list)
    launches: int = 0


def _addresses(pointers, mask) -> np.ndarray:
    seen = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
    return np.unique(np.asarray(pointers.data)[seen].astype(np.int64))


def _joined(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Every (address, program) once, by address."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.concatenate([np.stack([at, np.full_like(at, program)]) for program, at in accesses], axis=1)
    return tuple(np.unique(pairs, axis=1))


def _conflicts(launch: _Launch) -> list[str]:
    written, writers = _joined(launch.writes)
    read, readers = _joined(launch.reads)
    found = []
    twice = (written[1:] == written[:-1]).sum()
    if twice:
        found.append(f"{twice} addresses written by several programs")
    if len(written) and len(read):
        # An address has one writer, or the line above has said so.
        at = np.minimum(np.searchsorted(written, read), len(written) - 1)
        crossed = ((written[at] == read) & (writers[at] != readers)).sum()
        if crossed:
            found.append(f"{crossed} reads of what another program writes")
    return found


@contextlib.contextmanager
def find_races(seed: int) -> Iterator[Races]:
    """Within the block, every launch runs its programs in an order that ``seed`` decides, and is looked at after it."""
    races, generator, current = Races(), random.Random(seed), []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    set_dim, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    call = interpreter.GridExecutor.__call__

    def masked_load(self, pointers, mask, *args, **kwargs):
        current[-1].reads.append((current[-1].program, _addresses(pointers, mask)))
        return load(self, pointers, mask, *args, **kwargs)

    def masked_store(self, pointers, value, mask, *args, **kwargs):
        current[-1].writes.append((current[-1].program, _addresses(pointers, mask)))
        return store(self, pointers, value, mask, *args, **kwargs)

    def set_grid_dim(self, x, y, z):
        order = list(range(x * y * z))
        generator.shuffle(order)
        current[:] = [_Launch(order)]
        return set_dim(self, x, y, z)

    def set_grid_idx(self, x, y, z):
        _, columns, layers = self.grid_dim
        current[-1].program = n = current[-1].order[(x * columns + y) * layers + z]
        return set_index(self, n // (columns * layers), n // layers % columns, n % layers)

    def launch(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        if len(current[-1].order) > 1:
            races.launches += 1
            races.found += [f"{self.fn.__name__}: {what}" for what in _conflicts(current[-1])]
        return result

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (InterpreterBuilder, "create_masked_load", masked_load),
            (InterpreterBuilder, "create_masked_store", masked_store),
            (InterpreterBuilder, "set_grid_dim", set_grid_dim),
            (InterpreterBuilder, "set_grid_idx", set_grid_idx),
            (interpreter.GridExecutor, "__call__", launch),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield races
