"""What the loop does to a batch before the updates: KL into the rewards, bounds and whitening of the advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo import advantages as algo
from dvpo_service.algo.policy_loss import kl_penalty
from dvpo_service.config import AlgorithmConfig, KLConfig
from dvpo_service.types import Rollouts


def prepare_rewards(rollouts: Rollouts, kl: KLConfig) -> Rollouts:
    """Return the rollouts with rewards ``r_t - coef KL_t`` where ``policy.kl.where`` is "reward", else unchanged.

    Args:
      rollouts: rollouts with log-probs, and with reference log-probs if the config has a reference policy. Without
        reference log-probs they are returned unchanged.
    """
    if rollouts.ref_logprobs is None or kl.where != "reward":
        return rollouts
    assert rollouts.logprobs is not None, "log-probs are computed before the rewards are prepared"
    penalty = kl_penalty(rollouts.logprobs, rollouts.ref_logprobs, kl.kind)
    rewards = rollouts.rewards - kl.coef * penalty
    return rollouts.with_(rewards=torch.where(rollouts.response_mask, rewards, 0.0))


def prepare_advantages(advantages: Tensor, mask: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """Return the advantages [B, T] as the policy's loss takes them.

    They are first bounded by ``algorithm.max_advantage``, where that is set. Then, unless
    ``algorithm.whiten_advantages`` is false, they get mean 0 and standard deviation 1 over the batch's valid tokens.
    """
    if algorithm.max_advantage is not None:
        advantages = advantages.clamp(-algorithm.max_advantage, algorithm.max_advantage)
    if not algorithm.whiten_advantages:
        return advantages
    return algo.whiten(advantages, mask).float()
