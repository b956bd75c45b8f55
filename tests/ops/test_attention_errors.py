"""Attention's errors: each names the argument and what was expected."""

import math

import pytest
import torch

from fastllm.functional import attention

pytestmark = pytest.mark.runs_on("anywhere")

START = torch.tensor([0, 4])
BAD = {
    "dtype": (dict(query=torch.ones(1, 2, 4, 8, dtype=torch.int64)), TypeError, "query must be a floating"),
    "mixed": (dict(key=torch.ones(1, 2, 4, 8).half()), ValueError, "one dtype"),
    "dims": (dict(query=torch.ones(2, 4, 8)), ValueError, "expected .batch, heads, length, dim."),
    "head dim": (dict(query=torch.ones(1, 2, 4, 9)), ValueError, "one head dim"),
    "heads": (dict(query=torch.ones(1, 3, 4, 8)), ValueError, "multiple of key's, got 3 and 2"),
    "lengths": (dict(value=torch.ones(1, 2, 5, 8)), ValueError, "agree"),
    "batch": (dict(query=torch.ones(2, 2, 4, 8)), ValueError, "agree"),
    "p": (dict(dropout_p=1.5), ValueError, "between 0 and 1, got 1.5"),
    "window": (dict(window=(-5, 2)), ValueError, "window must hold integers"),
    "window length": (dict(window=(1, 2, 3)), ValueError, "window must be"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap"),
    "softcap inf": (dict(softcap=math.inf), ValueError, "softcap must be a finite number"),
    "scale of 2000 bits": (dict(scale=2**2000), ValueError, "scale must be a finite"),
    "scale": (dict(scale=math.nan), ValueError, "scale must be a finite"),
    "sinks": (dict(sinks=torch.ones(3)), ValueError, "sinks must be floating"),
    "slopes": (dict(alibi_slopes=torch.ones(2, 3)), ValueError, "alibi_slopes must be floating"),
    "slopes grad": (dict(alibi_slopes=torch.ones(2, requires_grad=True)), ValueError, "have no gradient"),
    "bias shape": (dict(bias=torch.ones(4, 5)), ValueError, "bias must broadcast to"),
    "bias dtype": (dict(bias=torch.ones(4, 4, dtype=torch.int32)), TypeError, "bias must be a boolean or floating"),
    "one cu": (dict(cu_seqlens_q=START), ValueError, "expected .total"),
    "max_seqlen": (dict(max_seqlen_q=4), ValueError, "belong to packed"),
    "max_seqlen str": (dict(max_seqlen_q="4"), TypeError, "max_seqlen_q must be an integer"),
    "max_seqlen < 0": (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k must not be negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, error, message = BAD[case]
    tensors = dict(query=torch.ones(1, 2, 4, 8), key=torch.ones(1, 2, 4, 8), value=torch.ones(1, 2, 4, 8))
    with pytest.raises(error, match=f"attention: .*{message}"):
        attention(**{**tensors, **changes})


def test_a_sequence_longer_than_a_bias_has_room_for_is_named():
    q, starts = torch.ones(7, 2, 8), torch.tensor([0, 2, 7])
    with pytest.raises(ValueError, match="max_seqlen_k is 4, and cu_seqlens_k has a sequence of 5 rows"):
        attention(
            q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=4, bias=torch.ones(5, 4)
        )


@pytest.mark.parametrize("starts", [[0, 9], [1, 4], [0, 3, 2]])
def test_bad_packing_is_named(starts):
    q = torch.ones(4, 2, 8)
    cu = torch.tensor(starts)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0"):
        attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(TypeError, match="int32 or int64"):
        attention(q, q, q, cu_seqlens_q=cu.float(), cu_seqlens_k=cu)
