"""The policy's loss, token by token: log-probs, surrogates, KL, importance correction.

The functions return [B, T]; reduce with ``aggregation.weighted_sum`` (or ``masks.masked_mean`` and the global token
count). Log-probs on padding must be finite: ``Rollouts`` keeps them at 0, and ``masks.zero_masked`` sets them to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.choices import BeyondCap, KlKind
from dvpo_service.algo.masks import float32_or_better, zero_masked

# exp(20) = 4.9e8 is far above any meaningful ratio, and 20 is far below the exponent where float32 overflows, 88.
MAX_LOG_RATIO = 20.0


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``log softmax(logits)[target]``, [B, T], float32 or better.

    Args:
      logits: [B, T, V], which the caller has divided by the sampling temperature.
      targets: [B, T] int64.

    Training uses ``chunked_logprobs``, which gives the same and needs no logits of a whole batch.
    """
    logprobs = torch.log_softmax(float32_or_better(logits), dim=-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return ``-sum_v p_v log p_v`` in nats, [B, T], float32 or better. ``logits`` [B, T, V] may contain -inf."""
    logprobs = torch.log_softmax(float32_or_better(logits), dim=-1)
    # Below -1e4 the probability is exactly 0; the clamp makes its term 0 * -1e4 instead of 0 * -inf, which is NaN.
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """Return an estimate of KL(policy || reference) for each token that the policy sampled, [B, T].

    With ``d = log ref - log p`` (Schulman, "Approximating KL divergence", 2020):

    - "k1": ``-d``, unbiased, of any sign.
    - "k2": ``d^2 / 2``, biased; on-policy its gradient equals the KL's gradient.
    - "k3": ``exp(d) - 1 - d``, unbiased and never negative. ``d`` is clamped at 20, so beyond there is no gradient.

    Raises ValueError for another kind.
    """
    d = ref_logprobs - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        d = d.clamp(max=MAX_LOG_RATIO)  # in both places: in the exponential alone the gradient would change its sign
        return torch.expm1(d) - d
    raise ValueError(f"the KL estimator is 'k1', 'k2' or 'k3', got {kind!r}")


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return PPO's ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, r = p / p_old (arXiv 1707.06347).

    The two clip ranges may differ, as in DAPO (arXiv 2503.14476). The log-ratio is clamped to +-20, so that nothing
    overflows. All tensors are [B, T].

    Args:
      dual_clip: c, which bounds the loss of a token with A < 0 by ``-c A`` (Ye et al. 2020, arXiv 1912.09729); None for
        no bound. PPO's own clip does not bound that loss when r grows.

    Returns:
      (loss [B, T], clipped [B, T] bool). ``clipped`` is True where either clip is active, so that the gradient is 0.

    Raises:
      ValueError: unless 0 <= clip_low <= 1, clip_high >= 0 and dual_clip > 1.
    """
    _check_clip_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"the dual clip bounds the ratio from above and must be > 1, got {dual_clip}")
    advantages = advantages.detach()
    objective, clipped = _clipped(_ratio(logprobs - old_logprobs.detach()), advantages, clip_low, clip_high)
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (objective < floor)
        objective = torch.where(below, floor, objective)
        clipped = clipped | below
    return -objective, clipped.detach()


def sequence_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return GSPO's ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` (arXiv 2507.18071).

    Each response has one ratio, ``s = exp(mean over the response's valid tokens of log p - log p_old)``. So the ratio
    is clipped for the whole response or not at all, and the ratio of a single token cannot run away. Aggregate with
    "seq_mean_token_mean": the mean of the tokens' losses is then the loss of the response, as in the paper's Eq. 5.
    Advantages may still differ from token to token. Clip ranges are usually of the order of 3e-4.

    Args:
      logprobs, old_logprobs, advantages: [B, T].
      mask: [B, T] bool; rows are whole responses.

    Returns:
      (loss [B, T], clipped [B, T] bool). ``clipped`` is True where the clip is active, so that the gradient is 0.

    Raises:
      ValueError: unless 0 <= clip_low <= 1 and clip_high >= 0.
    """
    _check_clip_range(clip_low, clip_high)
    log_ratio = zero_masked(logprobs - old_logprobs.detach(), mask)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = _ratio(log_ratio.sum(-1, keepdim=True) / lengths).expand_as(log_ratio)
    objective, clipped = _clipped(ratio, advantages.detach(), clip_low, clip_high)
    return -objective, clipped.detach()


def clipped_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return CISPO's ``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p``, r = p / p_old (arXiv 2506.13585, Eq. 4).

    ``sg`` stops the gradient. Only the weight is clipped, so every token keeps a gradient, including rare tokens whose
    gradient PPO's clip would set to 0. All tensors are [B, T].

    Returns:
      (loss [B, T], clipped [B, T] bool). ``clipped`` is True where the weight is clipped; the gradient there is
      bounded, not 0.

    Raises:
      ValueError: unless 0 <= clip_low <= 1 and clip_high >= 0.
    """
    _check_clip_range(clip_low, clip_high)
    ratio = _ratio(logprobs.detach() - old_logprobs.detach())
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages.detach() * logprobs, weight != ratio


def _check_clip_range(clip_low: float, clip_high: float) -> None:
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip range must have 0 <= low <= 1 and high >= 0, got {clip_low}, {clip_high}")


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return ``min(r A, clip(r) A)`` and where the clipped product is the smaller one."""
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return torch.minimum(unclipped, clipped), clipped < unclipped


@torch.no_grad()
def importance_weights(
    proximal_logprobs: Tensor,
    rollout_logprobs: Tensor,
    cap: float,
    *,
    beyond: BeyondCap = "truncate",
    floor: float = 0.0,
) -> Tensor:
    """Return weights from ``r = p_proximal / p_rollout`` for tokens that the rollout engine sampled, [B, T], detached.

    - "truncate": ``min(r, cap)``. The cap bounds the variance at the price of a bias (Ionides 2008; IMPALA, arXiv
      1802.01561; for rollout engines Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
      training"). ``floor`` is not used.
    - "mask": ``r`` where ``floor <= r <= cap``, else 0, so that a token on which engine and trainer disagree is left
      out (IcePop: Ring-1T, arXiv 2510.18855).

    Raises:
      ValueError: unless cap > 0 and 0 <= floor <= cap, and for another ``beyond``.
    """
    if not cap > 0:
        raise ValueError(f"the importance cap must be positive, got {cap}")
    if not 0.0 <= floor <= cap:
        raise ValueError(f"the importance floor must be from 0 to the cap {cap}, got {floor}")
    ratio = _ratio(proximal_logprobs - rollout_logprobs)
    if beyond == "truncate":
        return ratio.clamp(max=cap)
    if beyond == "mask":
        return torch.where((ratio > cap) | (ratio < floor), 0.0, ratio)
    raise ValueError(f"beyond the cap weights are 'truncate' or 'mask', got {beyond!r}")
