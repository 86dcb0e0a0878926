"""The loss of PPO's scalar critic (arXiv 1707.06347). The advantages of PPO are ``advantages.scalar_gae``."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, masked_mean, zero_masked


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    denominator: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the mean of ``0.5 (V - R)^2`` over valid tokens, optionally with PPO's value clipping.

    With clipping, the loss of a token is the larger of that and ``0.5 (clamp(V, V_old - clip, V_old + clip) - R)^2``.
    It has no gradient where V has moved by more than ``clip`` and the clipped value is the one farther from R. Value
    clipping is in PPO's code, not in the paper.

    Args:
      values: [B, T], the prediction; the only argument with a gradient.
      returns: [B, T].
      mask: [B, T] bool.
      old_values: [B, T], the prediction before the update; required with ``clip``.
      clip: > 0, in units of the return; None for no clipping.
      denominator: the number of valid tokens over all micro-batches and ranks (see ``masked_mean``).

    Returns:
      (loss, clipped): a scalar, float32 or better, and [B, T] bool, True for valid tokens whose loss is the clipped
      one.

    Raises:
      ValueError: when shapes differ, or ``clip`` is given without ``old_values`` or is not above 0.
    """
    values = zero_masked(float32_or_better(values), mask)
    returns = zero_masked(returns.detach().to(values.dtype), mask)
    error = (values - returns).square()
    if clip is None:
        return 0.5 * masked_mean(error, mask, denominator), torch.zeros_like(mask)
    if old_values is None or not clip > 0:
        raise ValueError(f"value clipping needs old values and a clip > 0, got clip={clip}")
    old_values = zero_masked(old_values.detach().to(values.dtype), mask)
    # Not old + clamp(V - old): that rounds away from V, and tokens that never left the range would count as clipped.
    near = values.clamp(old_values - clip, old_values + clip)
    clipped_error = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, denominator)
    return loss, (clipped_error > error) & mask
