"""The rule for errors itself: what is right passes it on any machine, and a fault of each kind does not."""

import pytest
import torch
from contract import assert_all_as_true, copy, run, truth_of

from fastllm.bench import parity
from fastllm.registry import OPS

pytestmark = pytest.mark.cpu_level


def reduced(t: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 with ``bits`` of its 23 bits of mantissa: 10 are TF32's and fp16's, 15 those of two bf16 parts."""
    drop = 23 - bits
    return ((t.detach().contiguous().view(torch.int32) + (1 << (drop - 1))) >> drop << drop).view(torch.float32)


def through(t: torch.Tensor, change) -> torch.Tensor:
    """``change(t)`` in the forward pass, whose gradient is passed on as it is."""
    return t + (change(t) - t).detach()


def attention(q, k, v, *, scale, weaken=lambda t: t, keys=None, spoil=lambda p: p):
    """A plain attention with a place for each fault."""
    logits = torch.matmul(through(q, weaken), through(k, weaken).transpose(-1, -2)) * scale
    if keys is not None:
        logits = logits[..., :keys]
    p = through(logits.softmax(-1), spoil)
    return torch.matmul(p, v[..., : p.shape[-1], :])


def large_logits():
    torch.manual_seed(1)
    return next(s for s in OPS["attention"].samples(torch.device("cpu"), torch.float32) if s.name == "large_logits")


FAULTS = {
    "tf32": {"weaken": lambda t: reduced(t, 10)},
    "products of two bf16 parts": {"weaken": lambda t: reduced(t, 15)},
    "fp16 probabilities": {"spoil": lambda p: p.half().float()},
    "probabilities below 1e-4 dropped": {"spoil": lambda p: torch.where(p < 1e-4, 0, p)},
    "a key dropped": {"keys": 23},
}


def judge(function, eager):
    """Whether ``function`` keeps the rule, where eager's own error is that of ``eager``."""
    sample, op = large_logits(), OPS["attention"]
    got, stick = run(function, copy(sample)), eager(sample)
    assert_all_as_true(got, truth_of(op, sample), stick, torch.float32, "attention")


def lucky(sample):
    """An eager PyTorch that makes no error but the last rounding: no machine's is better."""
    outs, grads = run(OPS["attention"].reference, copy(sample, torch.float64))
    return [t.float() for t in outs], [t.float() for t in grads]


def test_what_rounds_as_it_must_passes_beside_the_luckiest_eager():
    judge(attention, lucky)
    # The exponential's own base and a common shift, as kernels have it: more roundings, none of them a fault.

    def base_two(q, k, v, *, scale):
        logits = torch.matmul(q, k.transpose(-1, -2)) * (scale * 1.4426950408889634)
        lse = (logits - 0.0).mul(0.6931471805599453).logsumexp(-1, keepdim=True) * 1.4426950408889634
        return torch.matmul(torch.exp2(logits - lse), v)

    judge(base_two, lucky)


def test_a_product_whose_terms_cancel_has_the_roundings_of_its_terms():
    first, second = torch.tensor([[1e3, -1e3]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    most = max(draw.abs().item() for draw in parity.moved(lambda: first @ second))
    assert 1e-5 < most < 1e-3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault):
    def faulty(*args, **kwargs):
        return attention(*args, **kwargs, **FAULTS[fault])

    def eager(sample):
        return run(attention, copy(sample))

    with pytest.raises(AssertionError, match=r"error \S+ exceeds"):
        judge(faulty, eager)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "cross_entropy", "swiglu"])
def test_tf32_inputs_are_caught_in_every_kind_of_op(name):
    op = OPS[name]
    torch.manual_seed(1)
    sample = max(op.samples(torch.device("cpu"), torch.float32), key=lambda s: s.args[0].numel())

    def faulty(*args, **kwargs):
        weak = (
            through(t, lambda t: reduced(t, 10)) if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else t
            for t in args
        )
        return op.function(*weak, **kwargs)

    eager = run(op.function, copy(sample), "eager")
    assert_all_as_true(eager, truth_of(op, sample), eager, torch.float32, name)
    with pytest.raises(AssertionError, match=r"error \S+ exceeds"):
        assert_all_as_true(run(faulty, copy(sample), "eager"), truth_of(op, sample), eager, torch.float32, name)
