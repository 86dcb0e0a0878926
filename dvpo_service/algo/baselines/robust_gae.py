"""PPO with a robust Bellman backup under R-contamination.

The method is Wang and Zou's, "Online Robust Reinforcement Learning with Model Uncertainty" (arXiv 2109.14523) and
"Policy Gradient Method For Robust Reinforcement Learning" (ICML 2022, arXiv 2205.07344). With probability rho a
transition leads to the worst state instead of the state that the model gives, so the backup is

    T V(s) = r + gamma [ (1 - rho) V(s') + rho min V ]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvpo_service.algo.advantages import check_inputs, packed_gae
from dvpo_service.algo.scan import LastFirst


@torch.no_grad()
def robust_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    v_end: Tensor,
    gamma: float,
    lam: float | Tensor,
    rho: float,
    worst: float,
    ended: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of GAE with the robust one-step backup:

        delta_t = r_t + gamma [(1 - rho) V_{t+1} + rho worst] - V_t
        A_t     = delta_t + gamma lam (1 - rho) A_{t+1}

    The trace of ``lam`` has the factor 1 - rho because it continues only where the transition was the model's own. For
    lam = 1, ``V + A`` is the robust return of the sampled path. For rho = 0 the result equals ``scalar_gae``, bit for
    bit.

    Args:
      rewards, values: [B, T].
      mask: [B, T] bool.
      v_end: [B], the value after the last valid token: 0 where the sequence ended, else the critic's value.
      gamma, lam: discount and trace, in [0, 1]; lam is a number or a tensor as in ``scalar_gae``.
      rho: the contamination, in [0, 1].
      worst: the smallest value of any state; in practice the smallest in the global batch. The caller computes it,
        because it must be the same number on all ranks.
      ended: [B] bool. No transition follows the last token of a sequence that ended, so the backup of that token is
        ``r + gamma v_end``, without contamination. The last token of a sequence that was cut is contaminated like any
        other.

    Returns:
      (advantages, returns = values + advantages), both [B, T] and 0 where masked.

    Raises:
      ValueError: when the shapes do not fit, a parameter is outside [0, 1], or ``worst`` is not finite.
    """
    values, rewards, lam = check_inputs(rewards, values, mask, v_end, gamma, lam, axes=2)
    if ended.shape != mask.shape[:1]:
        raise ValueError(f"expected ended [B] for {mask.shape[0]} sequences, got {tuple(ended.shape)}")
    if not 0 <= rho <= 1 or not math.isfinite(worst):
        raise ValueError(f"need rho in [0, 1] and a finite worst value, got {rho} and {worst}")
    order, v_end = LastFirst(mask), v_end.to(values)
    after_last = torch.where(ended, v_end, (1 - rho) * v_end + rho * worst)
    backup = gamma * order.pack_following((1 - rho) * values + rho * worst, after_last)
    return packed_gae(order, rewards, values, backup, gamma * order.pack(lam) * (1 - rho))
