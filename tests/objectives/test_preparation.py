"""What the loop does to a batch before the updates."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dvpo_service.config import AlgorithmConfig, KLConfig
from dvpo_service.objectives.preparation import prepare_advantages, prepare_rewards
from tests.builders import make_rollouts


def test_the_kl_penalty_is_taken_from_the_rewards_of_valid_tokens() -> None:
    rollouts = make_rollouts()
    old = rollouts.rollout_logprobs
    rollouts = rollouts.with_(logprobs=old, ref_logprobs=old - 0.5)
    prepared = prepare_rewards(rollouts, KLConfig(coef=0.1, kind="k1", where="reward"))
    expected = torch.where(rollouts.response_mask, rollouts.rewards - 0.1 * 0.5, 0.0)
    assert_close(prepared.rewards, expected)
    assert prepared.tokens is rollouts.tokens


@pytest.mark.parametrize("kl", [KLConfig(coef=0.1, where="loss"), KLConfig(coef=0.0, where="reward")])
def test_without_a_penalty_in_the_reward_nothing_changes(kl: KLConfig) -> None:
    rollouts = make_rollouts()
    with_reference = rollouts.with_(logprobs=rollouts.rollout_logprobs, ref_logprobs=rollouts.rollout_logprobs)
    rollouts = with_reference if kl.coef else rollouts  # coefficient 0 loads no reference
    assert prepare_rewards(rollouts, kl) is rollouts


def test_advantages_are_whitened_where_the_config_says_so() -> None:
    mask = make_rollouts().response_mask
    advantages = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * 3 + 1, 0.0)
    white = prepare_advantages(advantages, mask, AlgorithmConfig.model_validate({}))
    assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(white[mask].std(correction=0), torch.tensor(1.0))
    assert (white[~mask] == 0).all()
    plain = AlgorithmConfig.model_validate({"adv_estimator": "grpo"})
    assert prepare_advantages(advantages, mask, plain) is advantages


def test_advantages_are_bounded_before_they_are_whitened() -> None:
    mask = make_rollouts().response_mask
    advantages = torch.where(mask, 1.0 + torch.arange(mask.numel()).view(mask.shape) % 3, 0.0)
    spiked = torch.where(mask & (mask.cumsum(1) == 1), 1000.0, advantages)
    plain = AlgorithmConfig.model_validate({"whiten_advantages": False, "max_advantage": 3.0})
    assert prepare_advantages(spiked, mask, plain)[mask].max() == 3.0
    white = prepare_advantages(spiked, mask, AlgorithmConfig.model_validate({"max_advantage": 3.0}))
    assert_close(white[mask].std(correction=0), torch.tensor(1.0))
    assert white.abs().max() < 3.0
