"""The losses of fastllm.losses beside those of TRL's trainers (trl 1.16), on random batches: the same numbers.

Where they differ, and who is right: TRL's DPO divides "ipo" by the answers' lengths, as the authors of its paper told
it; the function takes the sums or means that it is given. TRL's JSD leaves out T^2. TRL's entropy bonus is a mean over
tokens in every policy-gradient loss; here it is averaged as the rest of the loss.
"""

import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fastllm import losses
from fastllm.functional import linear_kl_div

pytestmark = pytest.mark.runs_on("anywhere")


def _trl(name):
    pytest.importorskip("trl", reason="TRL is not installed (pip install trl): there is nothing to compare with")
    return pytest.importorskip(name, reason=f"the installed TRL has no {name}")


class _Trainer(mock.MagicMock):
    """What a trainer's loss reads of itself; anything else is a mock."""


def _trainer(**attributes):
    accelerator = mock.MagicMock()
    accelerator.device = torch.device("cpu")
    accelerator.gather_for_metrics = accelerator.gather = lambda x: x
    trainer = _Trainer()
    trainer.accelerator, trainer._metrics = accelerator, defaultdict(lambda: defaultdict(list))
    trainer.model.training, trainer.aux_loss_enabled = False, False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def _log_probs(*shape):
    return -torch.rand(shape) * 3 - 0.05


def _outputs(log_probs):
    """A model's answer with ``fused_lm_head``: its log-probabilities are 0 where labels are ignored."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_trls(kind):
    module = _trl("trl.trainer.dpo_trainer")
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])  # two chosen, two rejected
    kept = mask[:, 1:]
    leaf = _log_probs(4, 3).requires_grad_()
    log_probs = leaf * kept
    reference = (_log_probs(4, 3) * kept).sum(1)
    trainer = _trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        beta=0.3, label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    inputs = dict(
        input_ids=torch.zeros(4, 4, dtype=torch.int64), attention_mask=torch.ones_like(mask), completion_mask=mask,
        ref_chosen_logps=reference[:2], ref_rejected_logps=reference[2:],
    )  # fmt: skip
    theirs = module.DPOTrainer._compute_loss(trainer, lambda **_: _outputs(log_probs), inputs, False)
    lengths = mask.sum(1) if kind == "ipo" else torch.ones(4)
    answers = (losses.sequence_log_probs(log_probs, kept) / lengths).chunk(2)
    mine = losses.dpo(*answers, *(reference / lengths).chunk(2), beta=0.3, kind=kind)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (mine, theirs)))


def test_orpo_cpo_and_simpo_are_trls():
    orpo, cpo = _trl("trl.experimental.orpo"), _trl("trl.experimental.cpo")
    chosen, rejected = (_log_probs(7).requires_grad_() for _ in range(2))
    odds = orpo.ORPOTrainer.odds_ratio_loss(_trainer(beta=0.3), chosen, rejected)[0]
    nll = torch.tensor(1.5)
    torch.testing.assert_close(losses.orpo(chosen, rejected, beta=0.3, nll=nll), nll - odds.mean())
    settings = dict(alpha=0.0, beta=0.3, label_smoothing=0.1, simpo_gamma=0.5)
    theirs = {
        kind: cpo.CPOTrainer.cpo_loss(_trainer(loss_type=kind, **settings), chosen, rejected)[0].mean()
        for kind in ("sigmoid", "hinge", "ipo", "simpo")
    }
    mine = {
        kind: losses.cpo(chosen, rejected, beta=0.3, kind=kind, nll_weight=0, label_smoothing=0.1 * (kind == "sigmoid"))
        for kind in ("sigmoid", "hinge", "ipo")
    }
    mine["simpo"] = losses.simpo(chosen, rejected, beta=0.3, gamma=0.5, label_smoothing=0.1)
    torch.testing.assert_close(mine, theirs)


def test_kto_is_trls():
    module = _trl("trl.trainer.kto_trainer")
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]])
    leaf = _log_probs(3, 3).requires_grad_()
    log_probs = leaf * mask[:, 1:]
    reference, label = -torch.rand(3), torch.tensor([True, False, True])
    trainer = _trainer(
        precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.2,
        undesirable_weight=0.7, _compute_kl_logps=lambda model, batch: torch.tensor([-1.0, -1.0, -0.5]),
    )  # fmt: skip
    inputs = dict(
        input_ids=torch.zeros(3, 4, dtype=torch.int64), attention_mask=torch.ones_like(mask), completion_mask=mask,
        label=label, ref_logps=reference, ref_KL_logps=torch.full((3,), -1.3),
    )  # fmt: skip
    theirs = module.KTOTrainer._compute_loss(trainer, lambda **_: _outputs(log_probs), inputs, False)
    policy = losses.sequence_log_probs(log_probs, mask[:, 1:])
    kl = torch.tensor([0.3, 0.3, 0.8]).mean()
    mine = losses.kto(policy, reference, label, kl=kl, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (mine, theirs)))


@pytest.mark.parametrize("with_margin", [False, True])
def test_the_reward_models_is_trls(with_margin):
    module = _trl("trl.trainer.reward_trainer")
    rewards = torch.randn(6, 1, requires_grad=True)
    args = SimpleNamespace(center_rewards_coefficient=0.02)
    margin = dict(margin=torch.rand(3)) if with_margin else {}
    theirs = module.RewardTrainer.compute_loss(
        _trainer(args=args), lambda **_: SimpleNamespace(logits=rewards), dict(margin)
    )
    mine = losses.reward_model(*rewards.squeeze(1).chunk(2), center=0.02, **margin)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_gradient_losses_are_trls(name, beta):
    module = _trl("trl.trainer.grpo_trainer")
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    log_probs, old, reference, entropy = (_log_probs(3, 4).requires_grad_() for _ in range(4))
    advantages = torch.randn(3)
    trainer = _trainer(
        beta=beta, epsilon_low=0.2, epsilon_high=0.28, max_completion_length=9, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        loss_type={"ppo": "bnpo", "gspo": "grpo"}.get(name, name),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropy, None),
    )  # fmt: skip
    trainer.accelerator.num_processes = 1
    ids = torch.zeros(3, 4, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask, advantages=advantages,
        old_per_token_logps=old.detach(), ref_per_token_logps=reference.detach(), num_items_in_batch=mask.sum(),
    )  # fmt: skip
    theirs = module.GRPOTrainer._compute_loss(trainer, None, inputs)
    options = dict(clip=(0.2, 0.28), reference_log_probs=reference, beta=beta)
    if name == "dr_grpo":
        options["max_length"] = 9
    mine = getattr(losses, name)(log_probs, old, advantages, mask, **options)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, log_probs)[0] for loss in (mine, theirs)))


@pytest.mark.parametrize(("direction", "beta"), [("forward", 0), ("reverse", 1), ("jsd", 0.3)])
def test_the_divergence_is_trls_times_the_temperature_squared(direction, beta):
    gkd = _trl("trl.experimental.gkd")
    x, w, tx, tw = (torch.randn(shape) for shape in ((2, 5, 8), (33, 8), (2, 5, 6), (33, 6)))
    labels = torch.where(torch.rand(2, 5) < 0.3, -100, 1)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(x @ w.t(), tx @ tw.t(), labels=labels, beta=beta, temperature=2.0)
    share = dict(beta=beta) if direction == "jsd" else {}
    mine = linear_kl_div(x, w, tx, tw, target=labels, direction=direction, temperature=2.0, **share)
    torch.testing.assert_close(mine / 4, theirs)


def test_a_trainer_with_these_log_probabilities_gets_trls():
    """The subclass of docs/post-training.md, as it stands there."""
    module, utils = _trl("trl.trainer.grpo_trainer"), _trl("trl.trainer.utils")
    page = (Path(__file__).parent.parent / "docs/post-training.md").read_text("utf-8")
    (snippet,) = (code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if "class Trainer" in code)
    space = {}
    exec(compile(snippet, "docs/post-training.md", "exec"), space)
    torch.manual_seed(0)
    config = _transformers().LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = _transformers().LlamaForCausalLM(config)
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    trainer = _trainer(temperature=0.7)
    mine = space["Trainer"]._get_per_token_logps_and_entropies(trainer, model, ids, mask, 5, compute_entropy=True)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    theirs = module.GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, ids, mask, 5, compute_entropy=True)
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b)


def _transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")
