"""The Huber advantage: the target's distribution y against the predicted one Z, pair by pair, with a bounded slope.

    A_t = 1/(M K) sum_k sum_j psi_c(y_tj - Z_tk),   psi_c(u) = clip(u, -c, c)

It is the slope of the Huber loss between two distributions (docs/algorithm.md, "The advantage"), and what it promises
follows from ``psi_c`` being odd and bounded:

- Where Z is the distribution of y the expectation of A is 0, whatever that distribution's shape. A clipped reward or a
  clipped advantage does not have this property where the distribution is skewed.
- ``|A| <= c``: a single wild reward has no more than its share of the update.
- Where no pair is further apart than c (0/1 rewards and c >= 1) it is the difference of means.
- A / c tends to ``P(y > Z) - P(y < Z)``, a win rate, as c tends to 0.

The table of M x K pairs is not needed. ``psi_c(u) = (|u + c| - |u - c|) / 2``, and a sum of distances over all pairs of
two sets is ``G(both) - G(one) - G(other)`` with ``G(x) = sum over pairs i < j of |x_i - x_j|``, which is a weighted sum
of the sorted x. The parts of one set alone cancel, which leaves two sorts per token: O((M + K) log (M + K)) time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better
from dvpo_service.algo.quantiles import ascending

_CHUNK = 256  # tokens at a time: on a CPU the temporaries should stay in cache


@torch.no_grad()
def huber_advantages(values: Tensor, targets: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return ``1/(M K) sum_kj clip(y_tj - Z_tk, -clip, clip)``, exact to rounding.

    Args:
      values: atoms Z [B, T, M], in any order.
      targets: atoms y [B, T, K], in any order; they may be infinite.
      mask: [B, T] bool. Tokens where it is False are not computed, whatever they hold.
      clip: c, in the units of the returns.

    Returns:
      [B, T], 0 where masked, detached and float32 or better. A NaN atom makes its own token NaN.

    Raises:
      ValueError: when the shapes do not fit, or ``clip`` is not positive and finite.
    """
    if values.dim() != 3 or targets.dim() != 3 or not values.shape[:2] == targets.shape[:2] == mask.shape:
        shapes = f"{tuple(values.shape)}, {tuple(targets.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"expected values [B,T,M], targets [B,T,K] and mask [B,T], got {shapes}")
    if min(values.shape[-1], targets.shape[-1]) == 0:
        raise ValueError("values and targets need at least one atom")
    if not 0 < clip < math.inf:
        raise ValueError(f"the clip must be positive and finite, got {clip}")
    values, targets = float32_or_better(values), float32_or_better(targets)
    advantages = values.new_zeros(mask.shape)
    step = _CHUNK if values.device.type == "cpu" else 1 << 14
    pairs = zip(values[mask].split(step), targets[mask].split(step), strict=True)
    if compared := [_mean_clipped_gap(z, y, clip) for z, y in pairs]:
        advantages[mask] = torch.cat(compared).to(advantages.dtype)
    return advantages


def _mean_clipped_gap(z: Tensor, y: Tensor, clip: float) -> Tensor:
    """Return the mean over pairs of ``clip(y_j - z_k)``: z [N, M], y [N, K] -> [N] float64."""
    dtype = torch.promote_types(z.dtype, y.dtype)
    z, y = z.double(), y.double()
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    centre = (low + high) / 2
    # A target further than c beyond the outermost atoms counts like one at c, so a wild one costs no digits.
    z, y = z - centre, y.clamp(low - clip, high + clip) - centre
    # And a clip beyond the largest gap counts like the largest gap.
    reach = torch.maximum(y.amax(-1, keepdim=True) - (low - centre), (high - centre) - y.amin(-1, keepdim=True))
    c = reach.clamp(max=clip)
    n = z.shape[-1] + y.shape[-1]
    weights = torch.arange(1 - n, n, 2, dtype=torch.float64, device=z.device)  # sorted x @ weights = G(x)
    # Once the numbers are centred, sorting them in the precision that they came in costs nothing and is faster.
    y = y.to(dtype)
    below, above = (ascending(torch.cat((shifted.to(dtype), y), -1)).double() @ weights for shifted in (z - c, z + c))
    return (below - above) / (2 * z.shape[-1] * y.shape[-1])
