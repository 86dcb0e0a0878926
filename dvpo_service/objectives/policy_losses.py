"""``policy.loss``: the surrogates by which a policy learns from advantages, one function each.

The equations are in ``algo/policy_loss.py``; the functions here pass them their settings. A loss of the user's own
takes the same arguments. It returns the loss, or the loss and where it was clipped (see ``PolicyLoss``).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dvpo_service.algo.policy_loss import clipped_surrogate, clipped_weight_loss, sequence_surrogate
from dvpo_service.config import PolicyConfig


class PolicyLoss(Protocol):
    """The loss of each token, before aggregation and importance correction."""

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig, /
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss [b, T], or a pair of the loss and where it was clipped, [b, T] bool.

        Args:
          logprobs: [b, T], of the sampled tokens under the policy now; the gradient flows through them. They equal
            ``old_logprobs`` where masked.
          old_logprobs: [b, T], before this step's updates.
          advantages: [b, T], whitened where the config asks for it.
          mask: [b, T] bool, the valid tokens; a row is a whole response.
          policy: the section of the config.
        """


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped surrogate, with ``policy.clip_low``, ``clip_high`` and ``dual_clip``."""
    return clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        dual_clip=policy.dual_clip,
    )


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """Return GSPO's surrogate, which has one ratio for a whole response.

    Use it with ``policy.loss_agg=seq_mean_token_mean`` and clip ranges around 3e-4.
    """
    return sequence_surrogate(
        logprobs, old_logprobs, advantages, mask, clip_low=policy.clip_low, clip_high=policy.clip_high
    )


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """Return CISPO's loss: the gradient of each log-prob with a clipped weight, so that no token loses its gradient."""
    return clipped_weight_loss(logprobs, old_logprobs, advantages, clip_low=policy.clip_low, clip_high=policy.clip_high)
