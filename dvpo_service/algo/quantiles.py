"""Quantile levels, quantiles between atoms, and means and variances of the tails of a set of atoms.

The atom at the edge of a tail counts with a fractional weight. So a tail of 0.29 x 100 atoms has 29 atoms, and the
tail's mean is continuous in its fraction.
"""

from __future__ import annotations

import math

import numpy as np
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
    """Return the levels tau_j, j = 1..M: ``j/M`` ("endpoint") or ``(2j-1)/2M`` ("midpoint"), shape [M].

    Keep ``dtype`` at float32 or better: in bf16 a quarter of 200 levels coincide with others. Raises ValueError for
    m < 1 or an unknown kind.
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


def ascending(x: Tensor) -> Tensor:
    """Return ``x`` [..., M] sorted along its last axis, detached; NaN comes last.

    On the CPU NumPy sorts: its vectorised sort keeps no indices, and is ten times faster than torch's.
    """
    x = x.detach()
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values


def interpolate_quantiles(atoms: Tensor, at: Tensor, levels: Tensor) -> Tensor:
    """Return the quantiles at ``levels``, linear between the atoms and constant beyond the outermost atoms.

    Args:
      atoms: [..., M], ascending.
      at: [M], the ascending levels of the atoms. Positions between atoms are computed in the dtype of ``at`` and
        ``levels``; give both in float64 where a float32 level might round to the wrong side of an atom.
      levels: [L], the levels asked for.

    Returns:
      [..., L], in the dtype of ``atoms`` and on their device.
    """
    if atoms.shape[-1] == 1:
        return atoms.expand(*atoms.shape[:-1], len(levels))
    right = torch.searchsorted(at, levels.to(at)).clamp(1, len(at) - 1)
    share = ((levels - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    below, above = atoms[..., right - 1], atoms[..., right]
    return torch.lerp(below, above, share.to(atoms).expand_as(below))


def tail_size(m: int, fraction: float) -> float:
    """Return ``k = min(max(fraction * m, 1), m)``, the number of atoms in the tail, not necessarily a whole number.

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
    """Return the weights ``clamp(k - i, 0, 1) / k``, shape [M], sum 1, where i = 0..M-1 counts from the outermost atom.

    Raises ValueError unless 0 < fraction <= 1.
    """
    k = tail_size(m, fraction)
    i = torch.arange(m, device=device, dtype=torch.float64)
    return ((k - i).clamp(0.0, 1.0) / k).to(dtype)


def lower_tail_mean(sorted_atoms: Tensor, alpha: float) -> Tensor:
    """Return the mean of the lowest fraction ``alpha`` of the atoms (CVaR_alpha): [..., M] ascending -> [...]."""
    atoms, weights = _lower_tail(sorted_atoms, alpha)
    return (atoms * weights).sum(-1)


def upper_tail_mean(sorted_atoms: Tensor, beta: float) -> Tensor:
    """Return the mean of the highest fraction ``beta`` of the atoms: [..., M] ascending -> [...]."""
    return lower_tail_mean(sorted_atoms.flip(-1), beta)


def lower_tail_variance(sorted_atoms: Tensor, alpha: float) -> Tensor:
    """Return the population variance of the lowest fraction ``alpha`` of the atoms: [..., M] ascending -> [...].

    It is 0, not NaN, for a tail of one atom.
    """
    atoms, weights = _lower_tail(sorted_atoms, alpha)
    mean = (atoms * weights).sum(-1, keepdim=True)
    return ((atoms - mean).square() * weights).sum(-1)


def upper_tail_variance(sorted_atoms: Tensor, beta: float) -> Tensor:
    """Return the population variance of the highest fraction ``beta`` of the atoms: [..., M] ascending -> [...]."""
    return lower_tail_variance(sorted_atoms.flip(-1), beta)


def crossing_count(z: Tensor, mask: Tensor) -> Tensor:
    """Return the number of adjacent atom pairs that decrease, over the valid tokens, a float64 scalar.

    Args:
      z: atoms [..., M] *before* sorting.
      mask: bool, with the leading axes of ``z``: [B, T] for ``z`` [B, T, M] or [B, T, H, M].
    """
    falls = (zero_masked(z, mask).diff(dim=-1) < 0).to(torch.float64)
    per_token = falls.sum(dim=tuple(range(mask.dim(), z.dim())))
    return masked_sum(per_token, mask)


def _lower_tail(sorted_atoms: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the atoms inside the tail and their weights. Atoms outside are left out, because inf * 0 is NaN."""
    m = sorted_atoms.shape[-1]
    inside = math.ceil(tail_size(m, fraction))
    weights = tail_weights(m, fraction, device=sorted_atoms.device, dtype=sorted_atoms.dtype)
    return sorted_atoms[..., :inside], weights[:inside]
