"""What verl, TRL and OpenRLHF compute, stated as formulas, where they and this service could be confused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.policy_loss import kl_penalty
from dvpo_service.config import AlgorithmConfig
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.objectives.preparation import prepare_advantages
from tests.builders import make_rollouts


def kl_gradients(seed: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the KL's gradient, and the expected gradients of the estimate in the loss and in the reward, [6] each.

    The expectations are sums over all six tokens of a categorical policy, so they are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits)[0]

    logp = logits.log_softmax(-1)
    p = logp.detach().exp()
    exact = gradient((logp.exp() * (logp - reference)).sum())
    logp = logits.log_softmax(-1)
    estimate = kl_penalty(logp, reference, kind)  # type: ignore[arg-type]
    in_loss = gradient((p * estimate).sum())  # tokens are sampled: no gradient through p
    in_reward = gradient((p * logits.log_softmax(-1) * estimate.detach()).sum())
    return exact, in_loss, in_reward


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_which_kl_estimate_has_the_gradient_of_the_kl(seed: int) -> None:
    """In the loss k2 has it, and k1 has none; in the reward k1 has it (arXiv 2510.01555)."""
    exact, in_loss, in_reward = kl_gradients(seed, "k1")
    assert_close(in_loss, torch.zeros_like(in_loss), rtol=0, atol=1e-12)
    assert_close(in_reward, exact)
    assert_close(kl_gradients(seed, "k2")[1], exact)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_another_gradient(kind: str) -> None:
    exact, _, in_reward = kl_gradients(0, kind)
    assert (in_reward - exact).norm() > 0.1 * exact.norm()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_reinforce_plus_plus_baseline_is_openrlhf_s_formula(seed: int) -> None:
    """``reinforce_baseline``: the outcome minus its group's mean, normalised over all tokens of the batch."""
    config = AlgorithmConfig.model_validate({"adv_estimator": "reinforce_plus_plus_baseline"})
    rollouts = make_rollouts(seed=seed)
    mask, groups = rollouts.response_mask, rollouts.prompt_index
    outcome = (rollouts.rewards.double() * mask).sum(1)
    scored = mask.any(1)
    mean = torch.stack([outcome[(groups == g) & scored].mean() for g in groups])
    tokens = (outcome - mean)[:, None].expand(mask.shape)[mask]
    expected = (tokens - tokens.mean()) / (tokens.var(correction=0) + 1e-8).sqrt()
    found = prepare_advantages(GroupEstimator(config).advantages(rollouts, 0)[0].advantages, mask, config)
    assert config.whiten_advantages
    assert_close(found[mask].double(), expected, rtol=1e-4, atol=1e-4)
    same = AlgorithmConfig.model_validate({"adv_estimator": "dr_grpo", "whiten_advantages": True})
    assert torch.equal(
        prepare_advantages(GroupEstimator(same).advantages(rollouts, 0)[0].advantages, mask, same), found
    )
