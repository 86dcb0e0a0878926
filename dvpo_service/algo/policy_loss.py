"""The policy's loss, token by token: log-probs, clipped surrogate, KL, importance correction.

Every function returns [B, T]; reduce with ``aggregation.weighted_sum`` (or ``masks.masked_mean`` and the global
token count). Log-probs on padding must be finite (``Rollouts`` keeps them 0; ``masks.zero_masked`` makes them so).
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
    dual_clip: float | None = None,
    is_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's ``-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, r = p / p_old (arXiv 1707.06347).

    Separate ranges as in DAPO (arXiv 2503.14476). ``dual_clip`` c bounds the loss of a token with A < 0 by
    ``-c A`` (Ye et al. 2020, arXiv 1912.09729): PPO's own clip has no bound where r grows and A < 0.
    ``is_weights`` w corrects for a rollout engine that is not p_old (decoupled PPO). The log-ratio is clamped
    to +-20 so that nothing overflows. All arguments [B, T].

    Returns:
      (loss [B, T], clipped [B, T] bool: where either clip holds, so that the gradient is 0).

    Raises:
      ValueError: unless 0 <= clip_low <= 1, clip_high >= 0 and dual_clip > 1.
    """
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip range must have 0 <= low <= 1 and high >= 0, got {clip_low}, {clip_high}")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"the dual clip bounds the ratio from above and must be > 1, got {dual_clip}")
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.detach()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective, clipped = torch.minimum(free, bounded), bounded < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (objective < floor)
        objective, clipped = torch.where(below, floor, objective), clipped | below
    loss = -objective
    if is_weights is not None:
        loss = loss * is_weights.detach()
    return loss, clipped.detach()


@torch.no_grad()
def importance_weights(
    proximal_logprobs: Tensor,
    rollout_logprobs: Tensor,
    cap: float,
    *,
    beyond: Literal["truncate", "mask"] = "truncate",
    floor: float = 0.0,
) -> Tensor:
    """Weights from ``r = p_proximal / p_rollout`` for tokens that the rollout engine sampled, [B, T], detached.

    "truncate": ``min(r, cap)``; ``cap`` bounds the variance at the price of a bias (Ionides 2008; IMPALA, arXiv
    1802.01561; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"). ``floor`` plays no part.
    "mask": ``r`` where ``floor <= r <= cap``, else 0, so that a token the two disagree on is left out (IcePop:
    Ring-1T, arXiv 2510.18855).

    Raises ValueError unless cap > 0 and 0 <= floor <= cap, and for another ``beyond``.
    """
    if not cap > 0:
        raise ValueError(f"the importance cap must be positive, got {cap}")
    if not 0.0 <= floor <= cap:
        raise ValueError(f"the importance floor must be from 0 to the cap {cap}, got {floor}")
    ratio = (proximal_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if beyond == "truncate":
        return ratio.clamp(max=cap)
    if beyond == "mask":
        return torch.where((ratio > cap) | (ratio < floor), 0.0, ratio)
    raise ValueError(f"beyond the cap weights are 'truncate' or 'mask', got {beyond!r}")
