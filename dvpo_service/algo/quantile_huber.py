"""Exact quantile-Huber loss of every atom against K target atoms without the [.., M, K] table.

Eq. 3 of arXiv 2512.03847 (quantile regression of Dabney et al. 2018, arXiv 1710.10044):

    l_i = mean_j |tau_i - 1{y_j < z_i}| h_d(y_j - z_i),   h_d(u) = u^2/2 if |u| <= d else d (|u| - d/2)

Sort the targets once per token; then each sum over j is a difference of prefix sums at three positions
found by binary search: O((H M + K) log K) time and O(H M) memory per token (LOSSES section 3).

Prefix sums cancel badly when the targets are large against d (an offset, a heavy tail). Two coordinates
keep the result exact to rounding, all in float64:

- the sums over *far* targets (linear part) use ``y - median``;
- the sums over targets *within d* of the atom (quadratic part) only need distances below d, so they use
  the targets with every gap shortened to at most 4 d: no distance up to d changes, and the coordinates
  stay within 4 d K of the median whatever the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo_service.algo.masks import float32_or_better

# Atoms per chunk: on a CPU the temporaries should stay in cache; a GPU wants few, large kernels.
_CHUNK_ATOMS = {"cpu": 1 << 16, "cuda": 1 << 23}


def quantile_huber(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool = False) -> Tensor:
    """Per-atom quantile-Huber losses ``l_i`` (Eq. 3), without the mean over atoms.

    Args:
      z: predicted atoms [..., H, M]; any order (no sort needed), gradient flows to it.
      y: target atoms [..., K] in any order, same leading axes; no gradient. K may differ from M, and
        K = 1 costs O(M).
      levels: tau [M] of the predicted atoms.
      delta: where h turns from quadratic to linear, > 0.
      unit: divide by ``delta``, so that the loss tends to the pinball loss as delta -> 0.

    Returns:
      [..., H, M] in float32 or better. Where y_j = z_i the derivative is 0. A NaN in a token's inputs
      makes that token's losses NaN.

    Raises:
      ValueError: on shapes that do not fit, K = 0, or delta not positive and finite.
    """
    if z.dim() < 2 or z.shape[:-2] != y.shape[:-1]:
        raise ValueError(f"atoms {tuple(z.shape)} [..., H, M] do not fit targets {tuple(y.shape)} [..., K]")
    if levels.shape != z.shape[-1:]:
        raise ValueError(f"{z.shape[-1]} atoms need as many levels, got {tuple(levels.shape)}")
    if y.shape[-1] == 0:
        raise ValueError("a target needs at least one atom")
    if not 0.0 < delta < float("inf"):
        raise ValueError(f"huber delta must be positive and finite, got {delta}")
    z, y = float32_or_better(z), float32_or_better(y.detach())
    with torch.autocast(z.device.type, enabled=False):
        losses: Tensor = _QuantileHuber.apply(z, y, levels, float(delta), unit)
    return losses


class _QuantileHuber(torch.autograd.Function):
    """Only ``dl/dz`` is kept for the backward pass: one float per atom."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool) -> Tensor:
        heads, m = z.shape[-2:]
        atoms, targets = z.reshape(-1, heads * m), y.reshape(-1, y.shape[-1])
        tau = levels.to(device=z.device, dtype=torch.float64).repeat(heads)
        losses, slopes = torch.empty_like(atoms), torch.empty_like(atoms)
        block = _pairs if y.shape[-1] == 1 else _sums
        scale = 1.0 / (targets.shape[-1] * (delta if unit else 1.0))
        step = max(1, _CHUNK_ATOMS.get(z.device.type, 1 << 20) // max(1, heads * m + targets.shape[-1]))
        for start in range(0, atoms.shape[0], step):
            part = slice(start, start + step)
            loss, slope = block(atoms[part].double(), targets[part].double(), tau, delta)
            losses[part], slopes[part] = loss.mul_(scale), slope.mul_(scale)
        ctx.save_for_backward(slopes.view(z.shape))
        return losses.view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return grad * slopes, None, None, None, None


def _pairs(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Loss and slope against one target each: a [N, Q], y [N, 1] -> [N, Q]."""
    u = y - a
    weight = torch.where(u < 0, 1 - tau, tau)
    clipped = u.clamp(-d, d)
    return weight * clipped * (u - clipped / 2), -weight * clipped


def _sums(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Loss and slope summed over the K targets: a [N, Q], y [N, K], both float64 -> [N, Q]."""
    y = y.sort(-1).values
    count = y.shape[-1]
    median = slice(count // 2, count // 2 + 1)

    below = torch.searchsorted(y, a)  # n1 = #{y < a}
    near = y.diff(dim=-1).clamp_(max=4 * d)
    near = torch.nn.functional.pad(near.cumsum_(-1), (1, 0))
    near -= near[:, median].clone()
    b = _locate(a, y, near, below, d)  # the atom in the coordinates of `near`
    n0 = torch.searchsorted(near, b - d)  # targets more than d below the atom
    n2 = torch.searchsorted(near, b + d, right=True)  # ... and all but those more than d above

    sum1, sum2 = _prefix_sum(near), _prefix_sum(near.square())
    at1, at2 = sum1.gather(-1, below), sum2.gather(-1, below)
    low1, low2 = _window(b, below - n0, at1 - sum1.gather(-1, n0), at2 - sum2.gather(-1, n0), d)
    high1, high2 = _window(-b, n2 - below, at1 - sum1.gather(-1, n2), sum2.gather(-1, n2) - at2, d)

    centre = y[:, median]
    total = _prefix_sum(y - centre)
    a = a - centre
    # Counts in float64: an integer tensor times a Python float would be float32.
    under, over = n0.double(), (count - n2).double()
    far_low = under * a - total.gather(-1, n0)
    far_high = total[:, -1:] - total.gather(-1, n2) - over * a

    loss = (1 - tau) * (d * far_low - under * (d * d / 2) + low2)
    loss += tau * (d * far_high - over * (d * d / 2) + high2)
    return loss, (1 - tau) * (d * under + low1) - tau * (d * over + high1)


def _locate(a: Tensor, y: Tensor, near: Tensor, below: Tensor, d: float) -> Tensor:
    """Atoms in the shortened coordinates: exact against every target within d, farther than d from others.

    Measured from the next target below if that is within d, else from the one above. Distances are cut at
    2 d, half of the longest gap, so that neither neighbour comes within d; beyond the first and the last
    target too, so that no square overflows.
    """
    left, right = (below - 1).clamp_(min=0), below.clamp(max=y.shape[-1] - 1)
    up = (a - y.gather(-1, left)).clamp_(-2 * d, 2 * d)
    down = (y.gather(-1, right) - a).clamp_(-2 * d, 2 * d)
    return torch.where(up <= d, near.gather(-1, left) + up, near.gather(-1, right) - down)


def _window(b: Tensor, n: Tensor, s1: Tensor, s2: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """``sum (b - x)`` and ``sum (b - x)^2 / 2`` over n points x in [b - d, b] with sums s1 and s2.

    The clamps are true of the exact sums; they keep rounding from crossing the limits.
    """
    n = n.double()
    linear = torch.minimum((n * b - s1).clamp_(min=0), n * d)
    square = torch.minimum(((s2 - 2 * b * s1 + b * b * n) / 2).clamp_(min=0), linear * (d / 2))
    return linear, square


def _prefix_sum(x: Tensor) -> Tensor:
    """[N, K] -> [N, K + 1]; entry n is the sum of the first n."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
