"""The policy's loss, token by token: log-probs, clipped surrogate, KL, importance correction.

Every function returns [B, T]; reduce with ``masks.masked_mean`` and the global token count. Log-probs on
padding must be finite (``Rollouts`` keeps them 0; ``masks.zero_masked`` makes them so).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better

# exp(20) = 4.9e8: far beyond any ratio that means something, far below float32's overflow at 88.
MAX_LOG_RATIO = 20.0


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """``log softmax(logits)[target]``: logits [B, T, V], targets [B, T] int64 -> [B, T], float32 or better.

    The caller divides the logits by the sampling temperature.
    """
    logprobs = torch.log_softmax(float32_or_better(logits), dim=-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """``-sum_v p_v log p_v`` in nats: [B, T, V] -> [B, T], float32 or better. Logits may hold -inf."""
    logprobs = torch.log_softmax(float32_or_better(logits), dim=-1)
    # Below -1e4 the probability is exactly 0; the clamp makes its term 0 * -1e4, not 0 * -inf.
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled, [B, T].

    With ``d = log ref - log p`` (Schulman, "Approximating KL divergence", 2020):
    k1 = -d (unbiased, any sign), k2 = d^2/2 (biased; its gradient is that of the KL on-policy),
    k3 = exp(d) - 1 - d (unbiased, never negative). The exponential is clamped at exp(20).
    """
    d = ref_logprobs - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(d.clamp(max=MAX_LOG_RATIO)) - d
    raise ValueError(f"the KL estimator is 'k1', 'k2' or 'k3', got {kind!r}")


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    is_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's ``-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, r = p / p_old (arXiv 1707.06347).

    Separate ranges as in DAPO (arXiv 2503.14476); ``is_weights`` w corrects for a rollout engine that is
    not p_old (decoupled PPO). The log-ratio is clamped to +-20 so that nothing overflows.

    Returns:
      (loss [B, T], clipped [B, T] bool: where the clipped branch is the smaller, so the gradient is 0).

    Raises:
      ValueError: unless 0 <= clip_low <= 1 and clip_high >= 0.
    """
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip range must have 0 <= low <= 1 and high >= 0, got {clip_low}, {clip_high}")
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.detach()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -torch.minimum(free, bounded)
    if is_weights is not None:
        loss = loss * is_weights.detach()
    return loss, (bounded < free).detach()


@torch.no_grad()
def importance_weights(proximal_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights ``min(p_proximal / p_rollout, cap)``, [B, T], detached.

    ``cap`` bounds the variance at the price of a bias (Ionides 2008; IMPALA, arXiv 1802.01561).

    Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"the importance cap must be positive, got {cap}")
    log_ratio = (proximal_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)
