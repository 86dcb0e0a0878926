"""Dr. GRPO: GRPO without the division by the group's spread (arXiv 2503.20783)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def dr_grpo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """``outcome - group mean`` on every valid token, [B, T]; 0 for a group of one.

    Dividing by the spread weighs up prompts that are almost always or almost never solved. The paper's
    other change, no division by an answer's length, belongs to the loss. Whitened over the batch this is
    also the group-baseline variant of REINFORCE++ (arXiv 2501.03262).

    Arguments and ValueError as in ``grpo``.
    """
    return over_tokens(grouped_outcomes(rewards, mask, groups).deviation, rewards, mask)
