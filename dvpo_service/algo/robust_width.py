"""A running width of the returns that wild rewards do not inflate, as they inflate a standard deviation.

The width of a batch is its interquartile range, in units in which a normal distribution has width 1 per standard
deviation: it stays about what it is while fewer than a quarter of the returns are wild on either side. The running
width is the mean over the batches, and at least a fifth of the largest batch's.

Where more than half of a batch's returns are equal, the range is often 0, which says nothing about their scale. Such
batches are left out; while there are no others, wider ranges are used.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

# The lower level of each range; the upper one is its mirror image.
LEVELS = (0.25, 0.1, 0.025)
FLOOR = 0.2


def no_widths() -> Tensor:
    """Return the state before the first batch, [ranges, 3] float64.

    For each range: the sum of the positive widths, their number, and the largest of them.
    """
    return torch.zeros(len(LEVELS), 3, dtype=torch.float64)


@torch.no_grad()
def add_batch(widths: Tensor, returns: Tensor) -> Tensor:
    """Return the state after one more batch, whose ``returns`` are [N], N >= 0, on any device."""
    if returns.numel() == 0:
        return widths
    both = [*LEVELS, *(1 - level for level in LEVELS)]
    low, high = np.quantile(returns.double().cpu().numpy(), both).reshape(2, -1)
    batch = torch.from_numpy(high - low) / torch.tensor([-2 * NormalDist().inv_cdf(level) for level in LEVELS])
    total, batches, largest = widths.unbind(1)
    return torch.stack((total + batch, batches + (batch > 0), torch.maximum(largest, batch)), 1)


def running_width(widths: Tensor) -> float:
    """Return the running width by the narrowest range that was ever positive, or 1.0 if none was."""
    for total, batches, largest in widths.tolist():
        if batches:
            return float(max(total / batches, FLOOR * largest))
    return 1.0
