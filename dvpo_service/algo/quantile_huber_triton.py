"""Quantile-Huber losses and slopes of every atom in one GPU kernel.

The kernel visits every pair (atom, target) in registers, so that HBM traffic is one read of the inputs and one write of
the two outputs. A search in sorted targets, as on the CPU, would do fewer operations, but it needs a sort, float64
prefix sums and some thirty scattered reads per atom; a pair costs ten plain instructions. Nothing can cancel here
either, because ``y - z`` is formed directly and only terms of one sign are added. The kernel is bound by arithmetic.

Importing this module needs Triton. With TRITON_INTERPRET=1 the kernel runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# With four atoms per lane consecutive instructions are independent; small blocks waste few lanes at the end.
_BLOCK, _WARPS = 128, 1


def losses_and_slopes(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool) -> tuple[Tensor, Tensor]:
    """Return the losses of Eq. 3 (arXiv 2512.03847) and their derivatives with respect to z, both like z.

    Args:
      z: atoms [N, H * M], float32 or float64.
      y: targets [N, K], float32 or float64.
      levels: tau [M].
      delta: the distance at which h turns linear. It and its products with ``|y - z|`` must be in the dtype's range.
      unit: divide by ``delta``.
    """
    dtype = torch.promote_types(z.dtype, y.dtype)
    atoms, targets, tau = (x.to(device=z.device, dtype=dtype).contiguous() for x in (z, y, levels))
    losses, slopes = torch.empty_like(atoms), torch.empty_like(atoms)
    # A tensor, because Triton would pass a Python float in float32.
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
    """Evaluate BLOCK atoms of one token, of any head, against all targets of the token."""
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
