"""Advantages that use more of the value distribution than its mean (docs/algorithm.md, "The advantage").

Scalar GAE on the mean atom is PPO with another baseline, so risk reaches the policy only through the three functions
here. ``cvar_advantages`` and ``entropic_advantages`` reduce to the plain difference of means, ``mean_j y_tj - mean_j
Z_tj``, at one value of their parameter; ``head_trust`` then leaves the advantages as they are. Masked tokens get 0
whatever they contain. Results are detached and float32 or better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked
from dvpo_service.algo.quantiles import tail_size

LARGEST_EXPONENT = 20.0


@torch.no_grad()
def cvar_advantages(values: Tensor, targets: Tensor, mask: Tensor, a: float) -> Tensor:
    """Return ``(1/a) [ mean_j (v - Z_tj)_+ - mean_j (v - y_tj)_+ ]``: what a token adds to the CVaR_a of the answer.

    ``v`` is the VaR_a of the distribution at the prompt (the atoms of the first valid token). It stays the same along
    the answer, and an outcome above ``v`` counts as ``v``. So a policy that follows this gradient maximises the CVaR of
    the return as seen from the prompt (Rockafellar and Uryasev 2000), rather than a nested CVaR per token. ``v`` is
    neither lowered by rewards already received nor discounted: the function is meant for an outcome at the end and
    gamma 1.

    As in Eq. 5, the tail has ``k = round(a M)`` atoms, at least 1; ``v`` lies half-way between atoms k and k + 1, and
    ``a`` becomes ``k / M``. Where k = M (a = 1) ``v`` is above all atoms, and the result is exactly the difference of
    means, to the last bit.

    Args:
      values: atoms Z [B, T, M], ascending.
      targets: atoms y [B, T, K], in any order.
      mask: [B, T] bool.
      a: the tail's fraction, in (0, 1].

    Returns:
      [B, T], 0 where masked.

    Raises:
      ValueError: when the shapes do not fit, or ``a`` is outside (0, 1].
    """
    values, targets = _checked(values, targets, mask)
    m = values.shape[-1]
    k = round(tail_size(m, a))
    if k == m:
        return zero_masked(targets.mean(-1) - values.mean(-1), mask)
    first = mask.int().argmax(1)
    prompt = values[torch.arange(len(values), device=values.device), first]
    v = ((prompt[:, k - 1] + prompt[:, k]) / 2)[:, None, None]
    gain = (v - values).relu().mean(-1) - (v - targets).relu().mean(-1)
    return zero_masked(gain * (m / k), mask)


@torch.no_grad()
def entropic_advantages(values: Tensor, targets: Tensor, mask: Tensor, b: float) -> Tensor:
    """Return ``{ mean_j e^{b (y_tj - c)} - mean_j e^{b (Z_tj - c)} } / b``, c = mean_j Z_tj.

    b < 0 avoids risk, b > 0 seeks it, and b = 0 is the difference of means to the last bit. For an exponent x above 20
    the exponential continues as its tangent ``e^20 (1 + x - 20)``. So no b or reward overflows, and a better target
    still has the larger advantage. Returns in [0, 1] never reach the tangent while |b| <= 20.

    Args:
      values: atoms Z [B, T, M].
      targets: atoms y [B, T, K], in any order.
      mask: [B, T] bool.
      b: finite, in units of 1 / return.

    Returns:
      [B, T], 0 where masked.

    Raises:
      ValueError: when the shapes do not fit, or ``b`` is not finite.
    """
    values, targets = _checked(values, targets, mask)
    if not math.isfinite(b):
        raise ValueError(f"b must be finite, got {b}")
    if b == 0:
        return zero_masked(targets.mean(-1) - values.mean(-1), mask)
    centre = values.mean(-1, keepdim=True)
    gain = _utility(b * (targets - centre)).mean(-1) - _utility(b * (values - centre)).mean(-1)
    return zero_masked(gain / b, mask)


@torch.no_grad()
def head_trust(advantages: Tensor, heads: Tensor, mask: Tensor, kappa: float) -> Tensor:
    """Return ``A_t / (1 + kappa s_t / sigma_t)``: a smaller advantage where the critic's heads disagree.

    ``s`` is the population sd over heads of the heads' means, and ``sigma`` is the population sd of the ensemble's
    atoms ``q``. Their ratio is the disagreement in units of the distribution's own width. Where the heads agree (one
    head, or sigma and s both 0) the advantage stays as it is. Where s > 0 and sigma = 0 it becomes 0, the limit.

    Args:
      advantages: [B, T].
      heads: atoms [B, T, H, M], each head ascending.
      mask: [B, T] bool.
      kappa: >= 0; with 0 the advantages are unchanged on valid tokens.

    Returns:
      [B, T], 0 where masked.

    Raises:
      ValueError: when the shapes do not fit, or ``kappa`` is negative or not finite.
    """
    if advantages.shape != mask.shape or heads.dim() != 4 or heads.shape[:2] != mask.shape:
        shapes = f"{tuple(advantages.shape)}, {tuple(heads.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"expected advantages [B,T], heads [B,T,H,M] and mask [B,T], got {shapes}")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"kappa must be a number >= 0, got {kappa}")
    advantages = zero_masked(float32_or_better(advantages), mask)
    if kappa == 0:
        return advantages
    heads = float32_or_better(heads)
    heads = heads - heads[..., :1, :1]  # so that a common offset costs no digits
    q = heads.mean(-2)
    disagreement = heads.mean(-1).std(-1, correction=0)
    width = (q - q[..., :1]).std(-1, correction=0)  # exactly 0 where all atoms are equal
    ratio = torch.where(disagreement > 0, disagreement / width, 0.0)
    return zero_masked(advantages / (1 + kappa * ratio), mask)


def _checked(values: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if values.dim() != 3 or targets.dim() != 3 or not values.shape[:2] == targets.shape[:2] == mask.shape:
        shapes = f"{tuple(values.shape)}, {tuple(targets.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"expected values [B,T,M], targets [B,T,K] and mask [B,T], got {shapes}")
    return float32_or_better(values), float32_or_better(targets)


def _utility(x: Tensor) -> Tensor:
    """Return ``e^x - 1`` without loss of digits for small x, continued linearly above ``LARGEST_EXPONENT``."""
    beyond = (x - LARGEST_EXPONENT).relu()
    return x.clamp(max=LARGEST_EXPONENT).expm1() + math.exp(LARGEST_EXPONENT) * beyond
