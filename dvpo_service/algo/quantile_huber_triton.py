"""Quantile-Huber losses and slopes of every atom in one GPU kernel.

Every pair (atom, target) is visited, in registers: HBM sees the inputs once and the two outputs once. A
search in sorted targets as on the CPU would do fewer operations, but it needs a sort, float64 prefix sums
and some thirty scattered reads an atom; a pair costs ten plain instructions. And nothing can cancel here:
``y - z`` is formed directly and only terms of one sign are added. The kernel is bound by arithmetic.

Importing this module needs Triton. With TRITON_INTERPRET=1 the kernel runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four atoms a lane give each instruction independent neighbours; small blocks waste few lanes at the end.
_BLOCK, _WARPS = 128, 1


def losses_and_slopes(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool) -> tuple[Tensor, Tensor]:
    """Losses of Eq. 3 (arXiv 2512.03847) and their derivatives in z, both like z.

    Args:
      z: atoms [N, H * M], float32 or float64.
      y: targets [N, K], float32 or float64.
      levels: tau [M].
      delta: where h turns linear; it and its products with ``|y - z|`` must be in the range of the dtype.
      unit: divide by ``delta``.
    """
    dtype = torch.promote_types(z.dtype, y.dtype)
    atoms, targets, tau = (x.to(device=z.device, dtype=dtype).contiguous() for x in (z, y, levels))
    losses, slopes = torch.empty_like(atoms), torch.empty_like(atoms)
    # A tensor, not a Python float: Triton would pass that in float32.
    threshold = torch.full((), delta, dtype=dtype, device=z.device)
    if atoms.numel():
        grid = (atoms.shape[0], triton.cdiv(atoms.shape[1], _BLOCK))
        with torch.cuda.device_of(atoms):
            _kernel[grid](
                *(atoms, targets, tau, threshold, losses, slopes),
                *(atoms.shape[1], tau.numel(), targets.shape[1]),
                UNIT=unit,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return losses.to(z.dtype), slopes.to(z.dtype)


@triton.jit
def _kernel(z, y, tau, delta, losses, slopes, atoms, levels, targets, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK atoms of one token, of any head, against all targets of the token."""
    token = tl.program_id(0).to(tl.int64)
    atom = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = atom < atoms
    at = token * atoms + atom
    a = tl.load(z + at, mask=inside, other=0.0)
    d = tl.load(delta)

    zero = tl.zeros([BLOCK], a.dtype)
    above, below, up, down = zero, zero, zero, zero
    for j in range(targets):
        u = tl.load(y + token * targets + j) - a
        clipped = tl.clamp(u, -d, d, propagate_nan=tl.PropagateNan.ALL)
        rise = tl.maximum(clipped, 0.0, propagate_nan=tl.PropagateNan.ALL)
        fall = tl.minimum(clipped, 0.0, propagate_nan=tl.PropagateNan.ALL)
        arm = u - 0.5 * clipped  # h(u) = clipped * arm; rise or fall is 0
        above += rise * arm
        below += fall * arm
        up += rise
        down += fall

    level = tl.load(tau + atom % levels, mask=inside, other=0.0)
    scale = targets * d if UNIT else targets
    tl.store(losses + at, (level * above + (1 - level) * below) / scale, mask=inside)
    tl.store(slopes + at, -(level * up + (1 - level) * down) / scale, mask=inside)
