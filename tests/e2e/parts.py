"""Parts of a user's own, which a job or a sweep has to find wherever its actors run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dvpo_service.objectives.policy_losses import ppo


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: Any) -> Any:
    """PPO's, by another name."""
    return ppo(logprobs, old_logprobs, advantages, mask, policy)


def spread(heads: Tensor, targets: Tensor, levels: Tensor) -> Tensor:
    """The distance between the outermost atoms."""
    return (heads[..., -1] - heads[..., 0]).mean(-1)
