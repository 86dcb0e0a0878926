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

On a GPU one Triton kernel does it all, see ``quantile_huber_triton``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dvpo_service.algo.masks import float32_or_better

# Atoms per chunk: on a CPU the temporaries should stay in cache; a GPU wants few, large kernels.
_CHUNK_ATOMS = {"cpu": 1 << 16, "cuda": 1 << 23}

# Atoms [N, H * M], targets [N, K], levels [M], delta, unit -> losses and slopes, both like the atoms.
_Evaluate = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


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
      [..., H, M] in float32 or better. Where y_j = z_i the derivative is 0. A NaN target makes all losses
      of its token NaN, a NaN atom its own.

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
        atoms, targets = z.reshape(-1, z.shape[-2] * z.shape[-1]), y.reshape(-1, y.shape[-1])
        losses, slopes = (_kernel_for(z, delta) or _by_sorting)(atoms, targets, levels, delta, unit)
        ctx.save_for_backward(slopes.view(z.shape))
        return losses.view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return grad * slopes, None, None, None, None


def _kernel_for(z: Tensor, delta: float) -> _Evaluate | None:
    """The Triton kernel where it can take ``z``: on CUDA devices, and anywhere in Triton's interpreter."""
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
    """Losses and their derivatives, each like z: atoms [N, H * M], targets [N, K], levels [M]."""
    tau = levels.to(device=z.device, dtype=torch.float64).repeat(z.shape[1] // max(1, levels.numel()))
    losses, slopes = torch.empty_like(z), torch.empty_like(z)
    block = _pairs if y.shape[-1] == 1 else _sums
    scale = 1.0 / (y.shape[-1] * (delta if unit else 1.0))
    step = max(1, _CHUNK_ATOMS.get(z.device.type, 1 << 20) // max(1, z.shape[1] + y.shape[-1]))
    for start in range(0, z.shape[0], step):
        part = slice(start, start + step)
        loss, slope = block(z[part].double(), y[part].double(), tau, delta)
        losses[part], slopes[part] = loss.mul_(scale), slope.mul_(scale)
    return losses, slopes


def _pairs(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Loss and slope against one target each: a [N, Q], y [N, 1] -> [N, Q]."""
    u = y - a
    weight = torch.where(u < 0, 1 - tau, tau)
    clipped = u.clamp(-d, d)
    return weight * clipped * (u - clipped / 2), -weight * clipped


def _sums(a: Tensor, y: Tensor, tau: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """Loss and slope summed over the K targets: a [N, Q], y [N, K], both float64 -> [N, Q]."""
    # On a CPU NumPy sorts many times faster than torch, several values an instruction; NaN last, as torch.
    y = y.sort(-1).values if y.is_cuda else torch.from_numpy(np.sort(y.numpy(), axis=-1))
    count = y.shape[-1]
    median = slice(count // 2, count // 2 + 1)

    below = _count_below(y, a)
    near = y.diff(dim=-1).clamp_(max=4 * d)
    near = torch.nn.functional.pad(near.cumsum_(-1), (1, 0))
    near -= near[:, median].clone()
    b = _locate(a, y, near, below, d)  # the atom in the coordinates of `near`
    # Targets more than d below the atom, and all but those d or more above it: at d both forms of h agree.
    n0, n2 = _count_below(near, torch.cat((b - d, b + d), -1)).tensor_split(2, -1)

    sum1, sum2 = _prefix_sum(near), _prefix_sum(near.square())
    at1, at2 = sum1.gather(-1, below), sum2.gather(-1, below)
    low1, low2 = _window(b, below - n0, at1 - sum1.gather(-1, n0), at2 - sum2.gather(-1, n0), d)
    high1, high2 = _window(-b, n2 - below, at1 - sum1.gather(-1, n2), sum2.gather(-1, n2) - at2, d)

    centre = y[:, median]
    total = _prefix_sum(y - centre)
    a = a - centre
    # Counts in float64: an integer tensor times a Python float would be float32.
    under, over = n0.double(), (count - n2).double()
    far_low = (a - d / 2).mul_(under).sub_(total.gather(-1, n0))
    far_high = (total[:, -1:] - total.gather(-1, n2)).sub_((a + d / 2).mul_(over))

    loss = low2.add_(far_low, alpha=d).mul_(1 - tau).add_(high2.add_(far_high, alpha=d).mul_(tau))
    slope = low1.add_(under, alpha=d).mul_(1 - tau).sub_(high1.add_(over, alpha=d).mul_(tau))
    return loss, slope


def _locate(a: Tensor, y: Tensor, near: Tensor, below: Tensor, d: float) -> Tensor:
    """Atoms in the shortened coordinates: exact against every target within d, farther than d from others.

    Measured from the next target below if that is within d, else from the one above. Distances are cut at
    2 d, half of the longest gap, so that neither neighbour comes within d; beyond the first and the last
    target too, so that no square overflows.
    """
    last = y.shape[-1] - 1
    up = a - y.gather(-1, (below - 1).clamp_(min=0))
    at = below.add(up <= d, alpha=-1).clamp_(0, last)
    return (a - y.gather(-1, at)).clamp_(-2 * d, 2 * d).add_(near.gather(-1, at))


def _window(b: Tensor, n: Tensor, s1: Tensor, s2: Tensor, d: float) -> tuple[Tensor, Tensor]:
    """``sum (b - x)`` and ``sum (b - x)^2 / 2`` over n points x in [b - d, b] with sums s1 and s2.

    The clamps are true of the exact sums; they keep rounding from crossing the limits.
    """
    n = n.double()
    linear = n * b
    square = s1.mul(-2).add_(linear).mul_(b).add_(s2).mul_(0.5).clamp_(min=0)
    linear = torch.minimum(linear.sub_(s1).clamp_(min=0), n.mul_(d))
    return linear, torch.minimum(square, linear * (d / 2))


def _count_below(x: Tensor, v: Tensor) -> Tensor:
    """``#{j: x_j < v_i}`` for sorted x [N, K] and v [N, Q] -> int64 [N, Q].

    On a CPU a binary search without branches, a whole tensor a step: twice as fast as torch.searchsorted
    where v is sorted, four times where it is not, for that mispredicts half of its comparisons.
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
    """[N, K] -> [N, K + 1]; entry n is the sum of the first n."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
