"""Exact quantile-Huber loss of every atom against K target atoms without the [.., M, K] table.

Eq. 3 of arXiv 2512.03847 (quantile regression of Dabney et al. 2018, arXiv 1710.10044):

    l_i = mean_j |tau_i - 1{y_j < z_i}| h_d(y_j - z_i),   h_d(u) = u^2/2 if |u| <= d else d (|u| - d/2)

The targets are sorted once per token. Each sum over j is then a difference of prefix sums at three positions, which
binary search finds. This takes O((H M + K) log K) time and O(H M) memory per token.

Differences of prefix sums cancel badly when the targets are large compared with d (an offset, a heavy tail). Two
coordinate systems, both in float64, keep the result exact to rounding:

- The sums over *far* targets (the linear part of h) use ``y - median``.
- The sums over targets *within d* of the atom (the quadratic part) only need distances below d. They use the targets
  with every gap shortened to at most 4 d: no distance up to d changes, and the coordinates stay within 4 d K of the
  median whatever the data.

On a GPU a single Triton kernel does the work, see ``quantile_huber_triton``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo_service.algo.masks import float32_or_better
from dvpo_service.algo.quantiles import ascending

# Atoms per chunk: on a CPU the temporaries should stay in cache; a GPU is fastest with few, large kernels.
_CHUNK_ATOMS = {"cpu": 1 << 16, "cuda": 1 << 23}

# Atoms [N, H * M], targets [N, K], levels [M], delta, unit -> losses and slopes, both like the atoms.
_Evaluate = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def quantile_huber(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool = False) -> Tensor:
    """Return the quantile-Huber loss ``l_i`` of every atom (Eq. 3), without the mean over atoms.

    Args:
      z: predicted atoms [..., H, M] in any order; the gradient flows to them.
      y: target atoms [..., K] in any order, with the same leading axes; they get no gradient. K may differ from M, and
        K = 1 costs O(M).
      levels: quantile levels tau [M] of the predicted atoms.
      delta: the distance at which h turns from quadratic to linear, > 0.
      unit: divide by ``delta``, so that the loss tends to the pinball loss as delta -> 0.

    Returns:
      Losses [..., H, M] in float32 or better. Where y_j = z_i the derivative is 0. A NaN target makes all losses of its
      token NaN; a NaN atom makes only its own loss NaN.

    Raises:
      ValueError: when the shapes do not fit, K = 0, or delta is not positive and finite.
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
    """The loss as an autograd function. It keeps only ``dl/dz`` for the backward pass, one float per atom."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool) -> Tensor:
        atoms = z.reshape(-1, z.shape[-2] * z.shape[-1])
        targets = y.reshape(-1, y.shape[-1])
        losses, slopes = (_kernel_for(z, delta) or _by_sorting)(atoms, targets, levels, delta, unit)
        ctx.save_for_backward(slopes.view(z.shape))
        return losses.view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return grad * slopes, None, None, None, None


def _kernel_for(z: Tensor, delta: float) -> _Evaluate | None:
    """Return the Triton kernel if it can take ``z``: on CUDA devices, and on any device in Triton's interpreter."""
    if not z.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    limits = torch.finfo(z.dtype)
    return _triton_kernel() if limits.tiny <= delta <= limits.max else None


@cache
def _triton_kernel() -> _Evaluate | None:
    try:
        from dvpo_service.algo.quantile_huber_triton import losses_and_slopes
    except ImportError:
        return None
    return losses_and_slopes


def _by_sorting(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool) -> tuple[Tensor, Tensor]:
    """Return losses and their derivatives, both like z: atoms [N, H * M], targets [N, K], levels [M]."""
    tau = levels.to(device=z.device, dtype=torch.float64).repeat(z.shape[1] // max(1, levels.numel()))
    losses, slopes = torch.empty_like(z), torch.empty_like(z)
    evaluate = _one_target if y.shape[-1] == 1 else _many_targets
    scale = 1.0 / (y.shape[-1] * (delta if unit else 1.0))
    step = max(1, _CHUNK_ATOMS.get(z.device.type, 1 << 20) // max(1, z.shape[1] + y.shape[-1]))
    for start in range(0, z.shape[0], step):
        part = slice(start, start + step)
        loss, slope = evaluate(z[part].double(), y[part].double(), tau, delta)
        losses[part], slopes[part] = loss.mul_(scale), slope.mul_(scale)
    return losses, slopes


def _one_target(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Return loss and slope against the single target of each token: a [N, Q], y [N, 1] -> [N, Q]."""
    u = y - a
    weight = torch.where(u < 0, 1 - tau, tau)
    clipped = u.clamp(-d, d)
    return weight * clipped * (u - clipped / 2), -weight * clipped


def _many_targets(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Return loss and slope summed over the K targets: a [N, Q], y [N, K], both float64 -> [N, Q]."""
    y = ascending(y)
    count = y.shape[-1]
    median = slice(count // 2, count // 2 + 1)

    below = _count_below(y, a)
    near = y.diff(dim=-1).clamp_(max=4 * d)
    near = torch.nn.functional.pad(near.cumsum_(-1), (1, 0))
    near -= near[:, median].clone()
    b = _locate(a, y, near, below, d)  # the atom in the coordinates of `near`
    # n0 counts the targets more than d below the atom; n2 counts all targets except those d or more above the atom. A
    # target at distance d may go to either part of h, because both parts agree there.
    n0, n2 = _count_below(near, torch.cat((b - d, b + d), -1)).tensor_split(2, -1)

    sum1, sum2 = _prefix_sum(near), _prefix_sum(near.square())
    at1, at2 = sum1.gather(-1, below), sum2.gather(-1, below)
    low1, low2 = _window(b, below - n0, at1 - sum1.gather(-1, n0), at2 - sum2.gather(-1, n0), d)
    high1, high2 = _window(-b, n2 - below, at1 - sum1.gather(-1, n2), sum2.gather(-1, n2) - at2, d)

    centre = y[:, median]
    total = _prefix_sum(y - centre)
    a = a - centre
    # Counts are converted to float64: an integer tensor times a Python float would be float32.
    under, over = n0.double(), (count - n2).double()
    far_low = (a - d / 2).mul_(under).sub_(total.gather(-1, n0))
    far_high = (total[:, -1:] - total.gather(-1, n2)).sub_((a + d / 2).mul_(over))

    loss = low2.add_(far_low, alpha=d).mul_(1 - tau).add_(high2.add_(far_high, alpha=d).mul_(tau))
    slope = low1.add_(under, alpha=d).mul_(1 - tau).sub_(high1.add_(over, alpha=d).mul_(tau))
    return loss, slope


def _locate(a: Tensor, y: Tensor, near: Tensor, below: Tensor, d: float) -> Tensor:
    """Return the atoms in the shortened coordinates: exact distances to targets within d, more than d to all others.

    An atom is placed relative to the next target below if that is within d, else relative to the next target above.
    Distances are cut at 2 d, half of the longest gap, so that an atom in a gap comes within d of neither neighbour. The
    same cut applies beyond the first and the last target, so that no square overflows.
    """
    last = y.shape[-1] - 1
    up = a - y.gather(-1, (below - 1).clamp_(min=0))
    at = below.add(up <= d, alpha=-1).clamp_(0, last)
    return (a - y.gather(-1, at)).clamp_(-2 * d, 2 * d).add_(near.gather(-1, at))


def _window(b: Tensor, n: Tensor, s1: Tensor, s2: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Return ``sum (b - x)`` and ``sum (b - x)^2 / 2`` over n points x in [b - d, b].

    s1 is the sum of the points, s2 the sum of their squares. The exact results lie within the limits of the clamps;
    the clamps keep rounded results there too.
    """
    n = n.double()
    linear = n * b
    square = s1.mul(-2).add_(linear).mul_(b).add_(s2).mul_(0.5).clamp_(min=0)
    linear = torch.minimum(linear.sub_(s1).clamp_(min=0), n.mul_(d))
    return linear, torch.minimum(square, linear * (d / 2))


def _count_below(x: Tensor, v: Tensor) -> Tensor:
    """Return ``#{j: x_j < v_i}`` for sorted x [N, K] and v [N, Q], int64 [N, Q].

    On a CPU this is a binary search without branches that moves the whole tensor one step at a time. It is twice as
    fast as torch.searchsorted where v is sorted, and four times where v is not, because torch.searchsorted then
    mispredicts half of its comparisons.
    """
    if x.is_cuda:
        return torch.searchsorted(x, v)
    steps = x.shape[-1].bit_length()
    x = torch.nn.functional.pad(x, (0, (1 << steps) - x.shape[-1]), value=float("inf"))
    count = torch.zeros(v.shape, dtype=torch.int64)
    for step in (1 << s for s in reversed(range(steps))):
        count.add_(x[:, step - 1 :].gather(-1, count) < v, alpha=step)
    return count


def _prefix_sum(x: Tensor) -> Tensor:
    """Return [N, K + 1] whose entry n is the sum of the first n values of ``x`` [N, K]."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
