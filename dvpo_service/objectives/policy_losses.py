"""``policy.loss``: the surrogates by which a policy learns from advantages, one function each.

The equations are in ``algo/policy_loss.py``; these give them their settings. A loss of the user's own has the same
arguments, and returns the loss, or the loss and where it was clipped.
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
        """Return the loss [b, T], and if known where it was clipped [b, T] bool.

        Args:
          logprobs: [b, T], of the sampled tokens now; the gradient flows through it. Equal to ``old_logprobs`` where
            masked.
          old_logprobs: [b, T], before this step's updates.
          advantages: [b, T], as they were prepared (whitened or not).
          mask: [b, T] bool, the valid tokens; a row is a whole response.
          policy: the section of the config.
        """


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, with ``policy.clip_low``, ``clip_high`` and ``dual_clip``."""
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
    """GSPO: one ratio a response. Give ``policy.loss_agg=seq_mean_token_mean`` and clip ranges around 3e-4 with it."""
    return sequence_surrogate(
        logprobs, old_logprobs, advantages, mask, clip_low=policy.clip_low, clip_high=policy.clip_high
    )


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, policy: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """CISPO: a clipped weight on the log-prob's gradient; no token falls silent."""
    return clipped_weight_loss(logprobs, old_logprobs, advantages, clip_low=policy.clip_low, clip_high=policy.clip_high)
