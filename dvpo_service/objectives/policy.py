"""The policy's objective: surrogate, KL penalty and entropy bonus of a micro-batch.

The critic's objectives are in ``dvpo_service/estimators``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.aggregation import token_weights, weighted_sum
from dvpo_service.algo.diagnostics import policy_sums
from dvpo_service.algo.policy_loss import importance_weights, kl_penalty
from dvpo_service.config import Config
from dvpo_service.registry import policy_losses
from dvpo_service.types import Rollouts


class PolicyObjective:
    """What the policy minimises:

    ``sum of w_t (c_t surrogate_t - entropy_coef H_t + kl_coef KL_t)`` over the valid tokens of an optimizer step, with
    aggregation weights w (``policy.loss_agg``), importance corrections c of tokens that the engine sampled
    (``rollout.importance_correction``), and the surrogate that ``policy.loss`` names.
    """

    def __init__(self, config: Config):
        self.policy = config.policy
        self.rollout = config.rollout
        self.surrogate = policy_losses.load(config.policy.loss)

    def loss(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        part: Rollouts,
        advantages: Tensor,
        *,
        num_tokens: float,
        num_sequences: float,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return a micro-batch's share of the loss, with its gradient, and two kinds of measurements.

        Args:
          logprobs, entropy: [b, T], by the policy now.
          part: the b sequences, on the device of ``logprobs``, with their log-probs before the step.
          advantages: [b, T].
          num_tokens, num_sequences: valid tokens, and responses with one, of the optimizer step over all micro-batches
            and ranks; the shares then add up.

        Returns:
          (scalar loss, shares of the step's loss, sums for ``diagnostics.policy_metrics``); both kinds are additive.
        """
        assert part.logprobs is not None, "log-probs are computed before the update"
        policy, mask, old, reference = self.policy, part.response_mask, part.logprobs, part.ref_logprobs
        weights = token_weights(
            mask,
            policy.loss_agg,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            horizon=self.rollout.max_new_tokens,
        )
        logprobs = torch.where(mask, logprobs, old)
        surrogate, clipped = self._surrogate(logprobs, old, advantages, mask)
        corrections = self._corrections(old, part)
        if corrections is not None:
            surrogate = surrogate * corrections
        loss = weighted_sum(surrogate, weights, mask)
        shares = {"surrogate": loss.detach()}
        if policy.entropy_coef:
            loss = loss - policy.entropy_coef * weighted_sum(entropy, weights, mask)
        if reference is not None and policy.kl.where == "loss":
            penalty = kl_penalty(logprobs, reference, policy.kl.kind)
            loss = loss + policy.kl.coef * weighted_sum(penalty, weights, mask)
        sums = policy_sums(logprobs.detach(), old, clipped, mask, ref_logprobs=reference, entropy=entropy.detach())
        return loss, shares, sums

    def _surrogate(self, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each token and where it was clipped, both [b, T]."""
        result = self.surrogate(logprobs, old, advantages, mask, self.policy)
        if isinstance(result, tuple):
            return result
        return result, torch.zeros_like(mask)

    def _corrections(self, old: Tensor, part: Rollouts) -> Tensor | None:
        """Return importance weights [b, T] of the tokens that the engine sampled; None where none are asked for."""
        rollout = self.rollout
        if rollout.correction == "none":
            return None
        if rollout.correction == "truncated":
            return importance_weights(old, part.rollout_logprobs, rollout.importance_cap)
        return importance_weights(
            old, part.rollout_logprobs, rollout.importance_cap, beyond="mask", floor=rollout.importance_floor
        )
