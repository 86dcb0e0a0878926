"""Dr. GRPO: GRPO without the division by the group's spread (arXiv 2503.20783)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def dr_grpo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Return ``outcome - group mean`` on every valid token, [B, T], 0 where masked and for a group of one.

    Dividing by the spread gives more weight to prompts that are almost always or almost never solved. The paper's other
    change, no division by the length of an answer, is made in the loss. Whitened over the batch, these advantages are
    also the group-baseline variant of REINFORCE++ (arXiv 2501.03262).

    Takes the arguments of ``grpo`` and raises ValueError as ``grpo`` does.
    """
    return over_tokens(grouped_outcomes(rewards, mask, groups).deviation, rewards, mask)
