"""linear_kl_div's computation: the logits of a chunk of rows at a time, in slices that stay in the cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ... import extension
from ..shared.autograd import without_autocast
from .chunks import chunk_plan
from .kl_call import DIRECTIONS, LinearKLDivCall
from .kl_rows import dense, divergence_and_slopes, kept_positions, log_softmax_of
from .products import Layer, LayerGradients, logits_into

# Twice linear_cross_entropy's on a CPU: two models' logits are held.
DEFAULT_WORKSPACE_MB = {"cuda": 1200.0, "cpu": 128.0}
# Logits of one model in a slice. A divergence takes about ten fp32 tensors of a slice's size. Guesses.
SLICE = {"cpu": 2**18, "cuda": 2**24}


def _rows_to_compute(kept):
    """The rows that count on a CPU, or None for all; a GPU's host does not wait to know how many there are."""
    if kept is None or kept.device.type != "cpu":
        return None
    index = kept.nonzero().squeeze(1)
    return None if len(index) == len(kept) else index


class _Chunk(NamedTuple):
    """Some rows: the student's logits, the teacher's logits or probabilities, which classes these are of."""

    logits: torch.Tensor
    teacher: torch.Tensor
    indices: torch.Tensor | None
    factor: torch.Tensor | None


def _rows_fake(student, *others):
    return student.new_empty(len(student), dtype=torch.promote_types(student.dtype, torch.float32))


_divergence_rows = extension.operator("divergence_rows", _rows_fake)


def _native_divergences(chunk: _Chunk, call: LinearKLDivCall, out) -> torch.Tensor:
    """As :func:`_eager_divergences`, by the extension."""
    how = call.divergence
    return _divergence_rows(
        chunk.logits, chunk.teacher, None if chunk.indices is None else chunk.indices.long(), chunk.factor, *out,
        DIRECTIONS.index(how.direction), how.beta, how.temperature, how.softcap or 0.0, how.teacher_softcap or 0.0,
    )  # fmt: skip


def _eager_divergences(chunk: _Chunk, call: LinearKLDivCall, out) -> torch.Tensor:
    """A value a row, (rows,). ``out``: where the gradients of the student's and of the teacher's logits go, or Nones.

    They may be the logits themselves.
    """
    how, wide, (rows, n_classes) = call.divergence, call.wide, chunk.logits.shape
    values = torch.empty(rows, dtype=wide, device=chunk.logits.device)
    step = max(1, SLICE.get(values.device.type, SLICE["cpu"]) // n_classes)
    for first in range(0, rows, step):
        at = slice(first, min(first + step, rows))
        log_q, slope_q = log_softmax_of(chunk.logits[at].to(wide), how.softcap, how.temperature)
        slope_p = None
        if chunk.indices is not None:
            log_p = dense(chunk.teacher[at], chunk.indices[at], n_classes, wide)
        else:
            log_p, slope_p = log_softmax_of(chunk.teacher[at].to(wide), how.teacher_softcap, how.temperature)
        needs = out[0] is not None, out[1] is not None
        values[at], *slopes = divergence_and_slopes(log_p, log_q, how, needs)
        for into, slope, bend in zip(out, slopes, (slope_q, slope_p), strict=True):
            if into is not None:
                assert slope is not None, "divergence_and_slopes has been asked for it"
                assert chunk.factor is not None, "a gradient has a factor"
                # T^2 of the loss over the T that the logits are divided by.
                factor = (chunk.factor[at] * how.temperature).unsqueeze(1)
                into[at] = (slope if bend is None else slope.mul_(bend)).mul_(factor)
    return values.mul_(how.temperature**2)


DIVERGENCES = {"eager": _eager_divergences, "native": _native_divergences}


def kl_in_chunks(call: LinearKLDivCall, factor: torch.Tensor | None, needs: tuple[bool, ...], backend: str):
    """(the rows' losses (N,) in at least fp32, six gradients), a chunk at a time. ``call`` has one leading dimension.

    ``factor`` (N,): the derivative by each row's loss, or None for no gradient. ``needs``: which of the six in
    ``call.layers()`` have one; the others are None.
    """
    x, teacher = call.input, call.teacher_input
    n, n_classes = len(x), len(call.linear_weight)
    needs = needs if factor is not None else (False,) * 6
    of_student, of_teacher = any(needs[:3]), any(needs[3:])
    head = None if call.teacher_weight is None else Layer(teacher, call.teacher_weight, call.teacher_bias)
    kept = kept_positions(call)
    index = _rows_to_compute(kept)
    count = n if index is None else len(index)
    by_logits = torch.zeros_like(teacher, memory_format=torch.contiguous_format) if needs[3] and head is None else None
    row_bytes = n_classes * (x.element_size() + (teacher.element_size() if head is not None or of_teacher else 0))
    workspace = call.divergence.max_workspace_mb or DEFAULT_WORKSPACE_MB.get(x.device.type, DEFAULT_WORKSPACE_MB["cpu"])
    rows = chunk_plan(count, row_bytes, workspace).rows
    chunks = math.ceil(count / rows)
    mine = LayerGradients.of(Layer(*call[:3]), needs[:3], backend, chunks, index is None)
    theirs = None
    if head is not None and of_teacher:
        theirs = LayerGradients.of(head, needs[3:], backend, chunks, index is None)
    logits = x.new_empty(min(rows, count), n_classes)
    beside = teacher.new_empty(min(rows, count), n_classes) if head is not None or of_teacher else None
    # Without slices: of a call of one row and 256 classes these take a fifth of the host's time.
    whole = index is None and 0 < count <= rows
    losses = None if whole else torch.zeros(n, dtype=call.wide, device=x.device)
    # Autocast would narrow the fp32 sums again.
    with without_autocast(x.device.type):
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            at = slice(start, stop) if index is None else index[start:stop]
            indices = call.teacher_indices
            if whole:
                xc, tc, z, z_teacher, of_rows = x, teacher, logits, beside, factor
            else:
                xc, tc, z = x[at], teacher[at], logits[: stop - start]
                z_teacher = None if beside is None else beside[: stop - start]
                indices = None if indices is None else indices[at]
                of_rows = None if factor is None else factor[at]
            logits_into(xc, call.linear_weight, call.linear_bias, z)
            # A head's logits, or what was given: logits or probabilities.
            of_teacher_rows = tc if head is None else logits_into(tc, head.weight, head.bias, z_teacher)
            chunk = _Chunk(z, of_teacher_rows, indices, of_rows)
            values = DIVERGENCES[backend](chunk, call, (z if of_student else None, z_teacher if of_teacher else None))
            if losses is None:
                losses = values
            else:
                losses[at] = values
            if of_student:
                mine.add(at, xc, z, z)
            if theirs is not None:
                theirs.add(at, tc, z_teacher, z_teacher)
            elif by_logits is not None and z_teacher is not None:
                by_logits[at] = z_teacher
    assert losses is not None, "there was a chunk, or they are zeros"
    losses = losses if kept is None else torch.where(kept, losses, 0.0)
    of_theirs = (by_logits, None, None) if theirs is None else (theirs.x, theirs.weight, theirs.bias)
    return losses, mine.x, mine.weight, mine.bias, *of_theirs
