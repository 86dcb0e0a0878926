"""Quantile levels, and means and variances of the tails of a set of atoms.

Tails are cut with fractional edge weights, so a tail of 0.29 x 100 atoms has 29 and the tail's mean is
continuous in its fraction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvpo_service.algo.choices import LevelKind
from dvpo_service.algo.masks import masked_sum, zero_masked


def quantile_levels(
    m: int,
    kind: LevelKind,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Levels tau_j, j = 1..M: ``j/M`` ("endpoint") or ``(2j-1)/2M`` ("midpoint"), shape [M].

    Keep ``dtype`` at float32 or better: a bf16 grid loses a quarter of 200 levels.

    Raises ValueError for m < 1 or an unknown kind.
    """
    if m < 1:
        raise ValueError(f"need at least one quantile, got {m}")
    j = torch.arange(1, m + 1, device=device, dtype=torch.float64)
    if kind == "endpoint":
        levels = j / m
    elif kind == "midpoint":
        levels = (2 * j - 1) / (2 * m)
    else:
        raise ValueError(f"quantile levels are 'endpoint' or 'midpoint', got {kind!r}")
    return levels.to(dtype)


def tail_size(m: int, fraction: float) -> float:
    """``k = min(max(fraction * m, 1), m)``: atoms in the tail, not necessarily a whole number.

    Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"a tail is a fraction in (0, 1], got {fraction}")
    return min(max(fraction * m, 1.0), float(m))


def tail_weights(
    m: int,
    fraction: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``clamp(k - i, 0, 1) / k`` for i = 0..M-1 counted from the tail's end, shape [M], sum 1."""
    k = tail_size(m, fraction)
    i = torch.arange(m, device=device, dtype=torch.float64)
    return ((k - i).clamp(0.0, 1.0) / k).to(dtype)


def lower_tail_mean(sorted_atoms: Tensor, alpha: float) -> Tensor:
    """Mean of the lowest ``alpha`` of the atoms (CVaR_alpha): [..., M] ascending -> [...]."""
    atoms, weights = _lower_tail(sorted_atoms, alpha)
    return (atoms * weights).sum(-1)


def upper_tail_mean(sorted_atoms: Tensor, beta: float) -> Tensor:
    """Mean of the highest ``beta`` of the atoms: [..., M] ascending -> [...]."""
    return lower_tail_mean(sorted_atoms.flip(-1), beta)


def lower_tail_variance(sorted_atoms: Tensor, alpha: float) -> Tensor:
    """Population variance of the lowest ``alpha`` of the atoms; 0, not NaN, for one atom."""
    atoms, weights = _lower_tail(sorted_atoms, alpha)
    mean = (atoms * weights).sum(-1, keepdim=True)
    return ((atoms - mean).square() * weights).sum(-1)


def upper_tail_variance(sorted_atoms: Tensor, beta: float) -> Tensor:
    """Population variance of the highest ``beta`` of the atoms."""
    return lower_tail_variance(sorted_atoms.flip(-1), beta)


def crossing_rate(z: Tensor, mask: Tensor) -> Tensor:
    """Share of adjacent atom pairs that decrease, ``z [..., M]`` *before* sorting, scalar in [0, 1].

    ``mask`` has the leading axes of ``z`` ([B,T] for [B,T,M] or [B,T,H,M]). 0 for M = 1 or no valid token.
    """
    if z.shape[-1] < 2:
        return torch.zeros((), dtype=torch.float32, device=z.device)
    pairs = mask.sum() * math.prod(z.shape[mask.dim() : -1]) * (z.shape[-1] - 1)
    return (crossing_count(z, mask) / pairs.clamp(min=1)).float()


def crossing_count(z: Tensor, mask: Tensor) -> Tensor:
    """Number of adjacent atom pairs that decrease over the valid tokens, scalar float64."""
    falls = (zero_masked(z, mask).diff(dim=-1) < 0).to(torch.float64)
    per_token = falls.sum(dim=tuple(range(mask.dim(), z.dim())))
    return masked_sum(per_token, mask)


def _lower_tail(sorted_atoms: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The atoms inside the tail and their weights; what lies outside is never touched (inf * 0)."""
    m = sorted_atoms.shape[-1]
    inside = math.ceil(tail_size(m, fraction))
    weights = tail_weights(m, fraction, device=sorted_atoms.device, dtype=sorted_atoms.dtype)
    return sorted_atoms[..., :inside], weights[:inside]
