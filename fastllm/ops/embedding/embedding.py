"""Embedding: rows of a table by id, and the table's gradient as fp32 sums in a fixed order."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import pick, plain_eager
from ...registry import Op, register
from ..shared.stand_ins import any_stands_in, overridden
from .call import EmbeddingCall, embedding_call, normalised_padding
from .eager import named_errors
from .operator import LookupOptions, differentiable_rows
from .ordinary import ordinary_embedding
from .samples import embedding_cost, embedding_examples, embedding_samples


def _torchs_own(input, weight, *options):
    with named_errors("embedding: input", input, weight):
        return F.embedding(input, weight, *options)


def _definition(call: EmbeddingCall):
    """The rows, with gradients summed in at least fp32 and rounded once to the table's dtype."""
    input, weight, vocab_range = call.input, call.weight, call.vocab_range
    if call.max_norm is not None:
        # A program has no no_grad().
        torch.embedding_renorm_(weight.detach(), input.contiguous(), call.max_norm, call.norm_type)
    start, end = (0, weight.shape[0]) if vocab_range is None else vocab_range
    padding = normalised_padding("embedding", call.padding_idx, weight.shape[0], partial=vocab_range is not None)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    held = (input >= start) & (input < end)
    rows = F.embedding(input if vocab_range is None else torch.where(held, input - start, 0), wide)
    rows = torch.where(held[..., None], rows, 0)
    rows = torch.where((input == padding)[..., None], rows.detach(), rows)
    if call.by_freq:
        counts = (input.reshape(-1, 1) == input.reshape(1, -1)).sum(1).view(*input.shape, 1)
        rows = rows.detach() + (rows - rows.detach()) / counts
    return rows.to(weight.dtype)


def embedding_reference(*args, **options):
    """The definition; takes embedding's arguments. ``main_grad`` changes nothing here."""
    return _definition(embedding_call(*args, **options))


def _prefers_torch(call: EmbeddingCall) -> str | None:
    if call.sparse:
        return "PyTorch alone makes sparse gradients"
    if not call.weight.is_floating_point():
        return "an integer table has no gradient, so PyTorch's lookup is all there is to do"
    if call.input.is_nested:
        return "PyTorch alone has nested ids"
    return None


def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False, *,
    main_grad=None, vocab_range=None,
):  # fmt: skip
    """``torch.nn.functional.embedding``: row ``input[...]`` of ``weight``.

    Forward copies rows bit for bit. The table's gradient is summed in fp32 (fp64 for fp64), in an order that depends on
    the ids alone. So it has the same bits for any number of threads and on every run, without atomics.

    Args:
        input: ids, int32 or int64, any shape and strides.
        weight: (num_embeddings, embedding_dim), any strides.
        padding_idx: an id whose row gets no gradient; negative ones count from the end.
        max_norm: rows of ``input`` with a larger ``norm_type`` norm are first scaled down to it, in place, as in torch.
        norm_type: see ``max_norm``.
        scale_grad_by_freq: divide each row's gradient by the number of its ids in ``input``.
        sparse: a sparse gradient, by torch's own operators.
        main_grad: (num_embeddings, embedding_dim), in the table's dtype or float32. Backward adds the gradient to it
            and gives ``weight`` none: there is no second buffer of the table's size. It may be ``weight.grad`` once
            that exists (micro-batches, weights tied to a head). Not under torch.compile, and not differentiable twice.
        vocab_range: (start, end) if ``weight`` holds only these ids of a larger vocabulary (vocabulary parallelism).
            Any other id gives a row of zeros and no gradient; ``padding_idx`` is then an id of the whole vocabulary.

    Returns:
        (*input.shape, embedding_dim), in the table's dtype.

    Raises:
        TypeError: an argument is not a tensor, or the ids are neither int32 nor int64.
        ValueError: a shape, device or option does not fit.
        IndexError: on CPU, an id is negative or not below num_embeddings; the message has its position. On CUDA a
            device-side assertion, as in torch.
        BackendError: the backend asked for cannot serve the call.
    """
    if max_norm is None and not scale_grad_by_freq and not sparse and main_grad is None and vocab_range is None:
        rows = ordinary_embedding(input, weight, padding_idx) if type(norm_type) is float else None
        if rows is not None:
            return rows
    if any_stands_in(input, weight):
        return overridden(
            embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            main_grad=main_grad, vocab_range=vocab_range,
        )  # fmt: skip
    call = embedding_call(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
        main_grad=main_grad, vocab_range=vocab_range,
    )  # fmt: skip
    if _prefers_torch(call) is not None:  # whatever backend was asked for
        return _torchs_own(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    backend = pick("embedding", call).backend
    if plain_eager(backend) and main_grad is None:
        return _definition(call)
    if max_norm is not None:
        # torch's lookup checks the ids and renormalises the rows; its output is not needed.
        with torch.no_grad():
            _torchs_own(input, weight, None, max_norm, norm_type, False, False)
    options = LookupOptions(
        backend == "native", padding_idx, scale_grad_by_freq, None if vocab_range is None else vocab_range[0]
    )
    return differentiable_rows(weight, input, options, main_grad)


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, with the same arguments and state_dict keys, on :func:`embedding`.

    Args:
        accumulate_grad: keyword-only. Once ``weight.grad`` exists, the backward adds to it directly, instead of giving
            autograd a second buffer of the table's size. It then bypasses hooks on ``weight`` and
            ``torch.autograd.grad``. Not under torch.compile.
    """

    def __init__(self, *args, accumulate_grad: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.accumulate_grad = accumulate_grad

    def forward(self, input):
        grad = self.weight.grad if self.accumulate_grad and not torch.compiler.is_compiling() else None
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse,
            main_grad=grad,
        )  # fmt: skip


register(
    Op(
        name="embedding",
        summary="rows of a table by id; the gradient as fp32 sums in a fixed order",
        function=embedding,
        reference=embedding_reference,
        samples=embedding_samples,
        cost=embedding_cost,
        backends=("eager", "native"),
        native_on=("cpu", "cuda"),
        module=Embedding,
        call=embedding_call,
        prefers_torch=_prefers_torch,
        examples=embedding_examples,
    )
)
