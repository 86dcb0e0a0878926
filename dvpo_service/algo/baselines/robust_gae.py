"""PPO with a robust Bellman backup under R-contamination.

Wang and Zou, "Online Robust Reinforcement Learning with Model Uncertainty" (arXiv 2109.14523) and "Policy
Gradient Method For Robust Reinforcement Learning" (ICML 2022, arXiv 2205.07344): with probability rho a
transition leads to the worst state in place of the one the model says, hence

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
    """GAE whose one-step backup is the robust one:

        delta_t = r_t + gamma [(1 - rho) V_{t+1} + rho worst] - V_t
        A_t     = delta_t + gamma lam (1 - rho) A_{t+1}

    the trace of ``lam`` going on only where the transition was the model's own. For lam = 1, ``V + A`` is the
    robust return of the sampled path. rho = 0 is ``scalar_gae``, bit for bit.

    Args:
      rewards, values: [B, T].
      mask: [B, T] bool.
      v_end: [B], what follows the last valid token: 0 where the sequence ended, else the critic's value.
      gamma, lam: discount and trace, in [0, 1]; lam a number or per token as in ``scalar_gae``.
      rho: the contamination, in [0, 1].
      worst: the least value of any state; in practice the least over the global batch. The caller's to
        find, for it must be one number for all ranks.
      ended: [B] bool. No transition follows the last token of a sequence that ended, so its backup is
        ``r + gamma v_end`` uncontaminated; one that was cut is contaminated like any other.

    Returns:
      (advantages [B, T], returns = values + advantages [B, T]), 0 where masked.

    Raises:
      ValueError: on shapes that do not fit, a parameter outside [0, 1] or a ``worst`` that is not finite.
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
