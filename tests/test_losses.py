"""The losses of fastllm.losses against the papers' formulas in fp64, values and gradients; metrics; errors."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm import losses
from fastllm.functional import linear_log_probs

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BETAS = st.sampled_from([0.01, 0.1, 0.5, 2])


def _log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def _agree(loss, oracle, tensors, dtype=torch.float32):
    """Values and gradients of both for the tensors, ``loss`` in ``dtype`` and ``oracle`` in fp64."""
    given = [t.detach().to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in given]
    got, expected = loss(*given), oracle(*exact)
    assert got.shape == ()
    assert got.dtype == torch.float32
    # Measured at most: 2.3e-7 of a value and 1.3e-6 of a gradient in fp32, 3.3e-3 of one in bf16.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(value, of, allow_unused=True) for value, of in ((got, given), (expected, exact))]
    tolerance = dict(rtol=1e-5, atol=1e-7) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-4)
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), theirs, **tolerance)


def _sums(n, rows=7, scale=8.0):
    return [-torch.rand(rows) * scale - 0.1 for _ in range(n)]


@SETTINGS
@given(
    beta=BETAS, kind=st.sampled_from(["sigmoid", "hinge", "ipo"]), smoothing=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_dpo(beta, kind, smoothing, dtype):
    torch.manual_seed(3)
    smoothing = smoothing if kind == "sigmoid" else 0.0

    def oracle(chosen, rejected, of_chosen, of_rejected):
        h = torch.log(chosen.exp() / of_chosen.exp()) - torch.log(rejected.exp() / of_rejected.exp())
        if kind == "sigmoid":
            rows = -(1 - smoothing) * _log_sigmoid(beta * h) - smoothing * _log_sigmoid(-beta * h)
        else:
            rows = torch.relu(1 - beta * h) if kind == "hinge" else (h - 1 / (2 * beta)) ** 2
        return rows.sum() / len(rows)

    _agree(lambda *a: losses.dpo(*a, beta=beta, kind=kind, label_smoothing=smoothing), oracle, _sums(4), dtype)


@SETTINGS
@given(beta=BETAS, alpha=st.sampled_from([0.0, 1.0, 0.3]), own=st.booleans(), gamma=st.sampled_from([0.0, 1.5]))
def test_cpo_orpo_and_simpo(beta, alpha, own, gamma):
    torch.manual_seed(3)
    chosen, rejected, nll = _sums(3, scale=3.0)

    def cpo(chosen, rejected, nll):
        return (-_log_sigmoid(beta * (chosen - rejected)) + alpha * (nll if own else -chosen)).mean()

    def orpo(chosen, rejected, nll):
        odds = [log_p.exp() / (1 - log_p.exp()) for log_p in (chosen, rejected)]
        return ((nll if own else -chosen) - beta * _log_sigmoid(torch.log(odds[0] / odds[1]))).mean()

    def simpo(chosen, rejected):
        return -_log_sigmoid(beta * chosen - beta * rejected - gamma).mean()

    def given_nll(nll):
        return dict(nll=nll) if own else {}

    _agree(lambda c, r, n: losses.cpo(c, r, beta=beta, nll_weight=alpha, **given_nll(n)), cpo, (chosen, rejected, nll))
    _agree(lambda c, r, n: losses.orpo(c, r, beta=beta, **given_nll(n)), orpo, (chosen, rejected, nll))
    _agree(lambda c, r: losses.simpo(c, r, beta=beta, gamma=gamma), simpo, (chosen, rejected))


def test_orpo_is_finite_where_an_answer_is_certain():
    chosen, rejected = torch.tensor([0.0, -1e-9, -80.0], requires_grad=True), torch.tensor([-90.0, 0.0, -1e-5])
    loss = losses.orpo(chosen, rejected)
    loss.backward()
    assert loss.isfinite()
    assert chosen.grad.isfinite().all()


@pytest.mark.parametrize("log_p", [-1e-6, -1e-3, -0.69, -0.7, -20.0])
def test_orpo_keeps_the_digits_of_likely_and_unlikely_answers(log_p):
    # 1 - exp(log_p) has lost them in float32 where log_p is near 0: 1e-6 becomes 9.5e-7.
    results = []
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([log_p], dtype=torch.float32).to(dtype).requires_grad_()
        loss, metrics = losses.orpo(chosen, chosen.detach() - 1, nll=chosen.new_zeros(()), return_metrics=True)
        loss.backward()
        results.append([x.double() for x in (metrics["log_odds_ratio"].detach(), loss.detach(), chosen.grad)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


@SETTINGS
@given(
    beta=BETAS, kl=st.sampled_from([0.0, 0.7, -0.5]), weights=st.sampled_from([(1.0, 1.0), (1.33, 0.5), (0, 1)]),
    which=st.sampled_from(["some", "all", "none"]),
)  # fmt: skip
def test_kto(beta, kl, weights, which):
    torch.manual_seed(3)
    desirable = {"some": torch.arange(7) % 3 == 0, "all": torch.ones(7) > 0, "none": torch.ones(7) < 0}[which]

    def oracle(policy, reference):
        r, z = policy - reference, max(kl, 0.0)
        rows = []
        for i, good in enumerate(desirable):
            value = torch.sigmoid(beta * (r[i] - z)) if good else torch.sigmoid(beta * (z - r[i]))
            rows.append((weights[0] if good else weights[1]) * (1 - value))
        return sum(rows) / len(rows)

    def loss(policy, reference):
        return losses.kto(
            policy, reference, desirable, kl=kl, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1]
        )

    _agree(loss, oracle, _sums(2))


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_model(center, with_margin):
    chosen, rejected, margin = (torch.randn(7) for _ in range(3))

    def oracle(chosen, rejected):
        rows = -_log_sigmoid(chosen - rejected - (margin.double() if with_margin else 0))
        return (rows + center * (chosen + rejected) ** 2).mean()

    options = dict(margin=margin) if with_margin else {}
    _agree(lambda c, r: losses.reward_model(c, r, center=center, **options), oracle, (chosen, rejected))


def _tokens(rows=4, length=6):
    lengths = torch.tensor([6, 1, 3, 0])[:rows]
    mask = torch.arange(length) < lengths[:, None]
    return [-torch.rand(rows, length) * 3 - 0.01 for _ in range(3)], torch.randn(rows, length), mask


def _policy_oracle(name, mask, low, high, options):
    """Token by token, as the papers write it."""
    rows, width = mask.shape

    def loss(new, old, reference, entropy, advantages):
        answers = []
        for i in range(rows):
            terms = []
            at = mask[i].nonzero().flatten().tolist()
            whole = sum(new[i, t] - old[i, t] for t in at) / max(len(at), 1)
            for t in at:
                ratio = torch.exp(whole if name == "gspo" else new[i, t] - old[i, t])
                gain = advantages[i] if advantages.dim() == 1 else advantages[i, t]
                clipped = max(min(ratio, torch.tensor(1.0 + high)), torch.tensor(1.0 - low))
                term = -min(ratio * gain, clipped * gain)
                log_odds = reference[i, t] - new[i, t]
                penalty = {"k1": -log_odds, "k2": log_odds**2 / 2, "k3": torch.exp(log_odds) - 1 - log_odds}
                term = term + options["beta"] * penalty[options["kl_estimator"]]
                terms.append(term - options["entropy_coef"] * entropy[i, t])
            answers.append(terms)
        if name in ("grpo", "gspo"):
            return sum(sum(terms) / max(len(terms), 1) for terms in answers) / rows
        total = sum(sum(terms) for terms in answers)
        return total / (rows * width if name == "dr_grpo" else int(mask.sum()))

    return loss


POLICY = ["ppo", "grpo", "dapo", "dr_grpo", "gspo"]


@pytest.mark.parametrize("name", POLICY)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    clip=st.sampled_from([0.2, (0.1, 0.3), 3e-4]), beta=st.sampled_from([0.0, 0.04]),
    coefficient=st.sampled_from([0.0, 0.01]), estimator=st.sampled_from(["k1", "k2", "k3"]), whole=st.booleans(),
    as_numbers=st.booleans(),
)  # fmt: skip
def test_policy_gradient_losses(name, clip, beta, coefficient, estimator, whole, as_numbers):
    torch.manual_seed(4)
    (new, reference, entropy), advantages, mask = _tokens()
    old = new + 0.3 * torch.randn(new.shape)
    advantages = advantages[:, 0] if whole else advantages
    options = dict(beta=beta, kl_estimator=estimator, entropy_coef=coefficient)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    oracle = _policy_oracle(name, mask, low, high, options)

    def loss(new, entropy):
        filled = torch.where(mask, new, math.nan)  # padding may hold anything
        given_mask = mask.float() if as_numbers else mask
        return getattr(losses, name)(
            filled, old, advantages, given_mask, clip=clip, reference_log_probs=reference, entropy=entropy, **options
        )

    def exact(new, entropy):
        return oracle(new, old.double(), reference.double(), entropy, advantages.double()) + 0 * (new + entropy).sum()

    given_tensors = [new.clone(), entropy.clone()]
    mine = [t.requires_grad_() for t in given_tensors]
    truth = [t.detach().double().requires_grad_() for t in given_tensors]
    got, expected = loss(*mine), exact(*truth)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)
    for a, b in zip(torch.autograd.grad(got, mine), torch.autograd.grad(expected, truth), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", POLICY)
def test_the_policy_that_sampled_is_the_one_that_learns(name):
    (new, *_), advantages, mask = _tokens()
    new.requires_grad_()
    function = getattr(losses, name)
    mine = torch.autograd.grad(function(new, None, advantages[:, 0], mask), new)[0]
    same = torch.autograd.grad(function(new, new, advantages[:, 0], mask), new)[0]
    assert mine.any()
    torch.testing.assert_close(same, mine)


def test_advantages_and_metrics_are_what_they_say():
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(losses.group_advantages(rewards, 2, normalize=False), torch.tensor([-1.0, 1, 0, 0]))
    expected = torch.tensor([-1.0, 1, 0, 0]) / (2**0.5 + 1e-4)
    torch.testing.assert_close(losses.group_advantages(rewards, 2), expected)

    new, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1.0, 9.0]])
    _, logged = losses.ppo(
        new, old, torch.ones(1), torch.tensor([[1, 1, 0]]), reference_log_probs=old, entropy=-new, return_metrics=True
    )
    expected = {
        "clip_share": 0.5, "ratio": (math.e + 1) / 2, "approx_kl": (math.e - 2) / 2, "kl": math.exp(-1) / 2,
        "entropy": 0.5,
    }  # fmt: skip
    assert {name: round(float(value), 5) for name, value in logged.items()} == {
        name: round(value, 5) for name, value in expected.items()
    }
    # Of a ratio below the range the clipped term is the smaller one where the advantage is negative, and above it where
    # it is positive.
    ratios = torch.tensor([[0.5, 0.5, 2.0, 2.0, 1.0]])
    gains = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0]])
    for counted, share in (([1, 0, 0, 0, 0], 1.0), ([0, 1, 0, 0, 0], 0.0), ([1] * 5, 0.4)):
        mask = torch.tensor([counted])
        _, logged = losses.ppo(ratios.log(), torch.zeros(1, 5), gains, mask, return_metrics=True)
        assert logged["clip_share"].item() == pytest.approx(share)
    pairs = [torch.tensor(values) for values in ([-1.0, -2.0], [-4.0, -1.0], [-2.0, -2.0], [-3.0, -1.0])]
    _, logged = losses.dpo(*pairs, beta=0.5, return_metrics=True)
    expected = {"chosen_reward": 0.25, "rejected_reward": -0.25, "margin": 0.5, "accuracy": 0.5}
    assert {name: float(value) for name, value in logged.items()} == expected
    _, logged = losses.kto(pairs[0], pairs[2], torch.tensor([True, False]), kl=0.3, beta=0.5, return_metrics=True)
    assert logged["margin"] == 0.5


def test_sequences_are_made_of_tokens():
    log_probs = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, -4.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(losses.sequence_log_probs(log_probs, mask), torch.tensor([-3.0, -5.0]))
    average = losses.sequence_log_probs(log_probs, mask, average=True)
    torch.testing.assert_close(average, torch.tensor([-1.5, -5.0]))
    average.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))


def test_a_head_learns_a_preference_from_end_to_end():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 33, bias=False)
    states = torch.randn(2, 4, 5, 8)
    tokens = torch.randint(0, 33, (2, 4, 5))
    mask = torch.ones(4, 5)

    def answers():
        found = linear_log_probs(states, head.weight, tokens)
        return [losses.sequence_log_probs(each, mask) for each in found]

    reference = [each.detach() for each in answers()]
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(30):
        loss, logged = losses.dpo(*answers(), *reference, return_metrics=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logged["accuracy"] == 1
    assert loss < 0.5


@pytest.mark.parametrize("name", ["dpo", "grpo", "orpo"])
def test_compiles_whole(name):
    (new, old, _), advantages, mask = _tokens()
    args = {"dpo": _sums(4), "orpo": _sums(2), "grpo": (new, old, advantages, mask)}[name]
    compiled = torch.compile(getattr(losses, name), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), getattr(losses, name)(*args))


A, TOKENS, MASK = torch.full((3,), -1.0), torch.full((3, 2), -1.0), torch.ones(3, 2)
ENDS = torch.tensor([0, 3])
WRONG = {
    "dpo: policy_rejected must be of shape [3], got [2]": lambda: losses.dpo(A, A[:2], A, A),
    "dpo: policy_chosen must be of shape (B,), a number a sequence, got [3, 2]": lambda: losses.dpo(*[TOKENS] * 4),
    "dpo: policy_chosen must be of shape (B,), a number a sequence, got [0]": lambda: losses.dpo(*[A[:0]] * 4),
    "dpo: beta must be finite and above 0.0, got 0": lambda: losses.dpo(A, A, A, A, beta=0),
    "dpo: beta must be finite and above 0.0, got nan": lambda: losses.dpo(A, A, A, A, beta=math.nan),
    "dpo: kind must be one of sigmoid, hinge, ipo; got 'x'": lambda: losses.dpo(A, A, A, A, kind="x"),
    "dpo: label_smoothing must be below 0.5": lambda: losses.dpo(A, A, A, A, label_smoothing=0.5),
    "dpo: label_smoothing is for kind": lambda: losses.dpo(A, A, A, A, label_smoothing=0.1, kind="ipo"),
    "dpo: reference_chosen must be a floating-point tensor, got torch.int64": lambda: losses.dpo(A, A, A.long(), A),
    "dpo: reference_rejected must be a floating-point tensor, got NoneType": lambda: losses.dpo(A, A, A, None),
    "dpo: beta must be a number, got str": lambda: losses.dpo(A, A, A, A, beta="0.1"),
    "cpo: nll must be a scalar or of shape [3], got [2]": lambda: losses.cpo(A, A, nll=A[:2]),
    "orpo: policy_rejected must hold log-probabilities, got one above 0": lambda: losses.orpo(A, -A),
    "simpo: gamma must be finite and at least 0.0, got -1": lambda: losses.simpo(A, A, gamma=-1),
    "kto: desirable must be a boolean tensor": lambda: losses.kto(A, A, A),
    "kto: kl must be a number or a scalar": lambda: losses.kto(A, A, A < 0, kl=A),
    "reward_model: margin must be of shape [3], got [2]": lambda: losses.reward_model(A, A, margin=A[:2]),
    "sequence_log_probs: the answer of row 0 is empty": lambda: losses.sequence_log_probs(TOKENS, 0 * MASK),
    "sequence_log_probs: log_probs must be of shape (B, T)": lambda: losses.sequence_log_probs(A, A),
    "grpo: no token counts": lambda: losses.grpo(TOKENS, TOKENS, A, 0 * MASK),
    "grpo: mask must be of shape [3, 2], got [3]": lambda: losses.grpo(TOKENS, TOKENS, A, MASK[:, 0]),
    "ppo: advantages must be of shape [3] or [3, 2], got [2]": lambda: losses.ppo(TOKENS, TOKENS, A[:2], MASK),
    "ppo: old_log_probs must be of shape [3, 2], got [3]": lambda: losses.ppo(TOKENS, A, A, MASK),
    "gspo: clip must be finite and above 0.0, got 0": lambda: losses.gspo(TOKENS, TOKENS, A, MASK, clip=(0, 1)),
    "grpo: beta is 0.1, which needs reference_log_probs": lambda: losses.grpo(TOKENS, TOKENS, A, MASK, beta=0.1),
    "grpo: kl_estimator must be one of k1, k2, k3": lambda: losses.grpo(TOKENS, TOKENS, A, MASK, kl_estimator="k4"),
    "grpo: entropy_coef is 0.1, which needs entropy": lambda: losses.grpo(TOKENS, TOKENS, A, MASK, entropy_coef=0.1),
    "dr_grpo: max_length must be finite": lambda: losses.dr_grpo(TOKENS, TOKENS, A, MASK, max_length=0),
    "group_advantages: rewards must be of shape (B,)": lambda: losses.group_advantages(A, 2),
    "kl_estimate: estimator must be one of": lambda: losses.kl_estimate(A, A, "k0"),
    "kl_estimate: estimator must be one of k1, k2, k3; got [": lambda: losses.kl_estimate(A, A, ["k1"]),
    "kl_estimate: log_probs must be a dense tensor": lambda: losses.kl_estimate(A.to_sparse(), A),
    "dpo: beta must fit in a float": lambda: losses.dpo(A, A, A, A, beta=2**2000),
    "ppo: mask must hold booleans or real numbers": lambda: losses.ppo(TOKENS, TOKENS, A, MASK + 1j),
    "ppo: mask must be a dense tensor": lambda: losses.ppo(TOKENS, TOKENS, A, MASK.to_sparse()),
    "group_advantages: eps must be a number": lambda: losses.group_advantages(A[:2], 2, eps="x"),
    "group_advantages: eps must be finite": lambda: losses.group_advantages(A[:2], 2, eps=math.nan),
    "kto: kl must be a dense tensor": lambda: losses.kto(A, A, A < 0, kl=A.to_sparse()),
    "grpo: clip must be a number or a pair": lambda: losses.grpo(TOKENS, TOKENS, A, MASK, clip=(0.1, 0.2, 0.3)),
    "group_advantages: group_size must be an integer": lambda: losses.group_advantages(A, 3.0),
    "kto: kl must be a number, got str": lambda: losses.kto(A, A, A < 0, kl="a"),
    "unpack: values must be a tensor of shape (total,)": lambda: losses.unpack(TOKENS, ENDS),
    "unpack: values must be a tensor, got list": lambda: losses.unpack([1.0], ENDS),
    "unpack: max_seqlen must be an integer": lambda: losses.unpack(A, ENDS, max_seqlen=math.nan),
    "unpack: max_seqlen must not be negative": lambda: losses.unpack(A, ENDS, max_seqlen=-1),
    "unpack: cu_seqlens must be int32 or int64": lambda: losses.unpack(A, A),
    "unpack: cu_seqlens must be of shape (B + 1,)": lambda: losses.unpack(A, ENDS[:1]),
    "unpack: cu_seqlens must ascend from 0 to the 3": lambda: losses.unpack(A, torch.tensor([0, 2])),
    "unpack: cu_seqlens must ascend from 0 to the 2": lambda: losses.unpack(A[:2], torch.tensor([0, 3, 2])),
    "unpack: max_seqlen is 1, the longest sequence has 3": lambda: losses.unpack(A, ENDS, max_seqlen=1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message)


def test_options_that_are_integers_count_as_floats():
    """Of any size: an operator takes none of more than 64 bits. And True is 1."""
    pairs = [A - 1e-6, A, A, A]
    assert losses.dpo(*pairs, beta=10**25) == losses.dpo(*pairs, beta=1e25)
    assert losses.simpo(A, A, gamma=True) == losses.simpo(A, A, gamma=1.0)
    assert losses.kto(A, A, A < 0, kl=10**25) == losses.kto(A, A, A < 0, kl=1e25)
    assert losses.dr_grpo(TOKENS, None, A, MASK, max_length=10**25) == losses.dr_grpo(
        TOKENS, None, A, MASK, max_length=1e25
    )
