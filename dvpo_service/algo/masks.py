"""Reductions over valid tokens.

They select with ``where`` and never multiply by the mask, because ``0 * NaN`` is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_or_better(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is bf16 or half; return float32 and float64 tensors as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` [*mask.shape, ...] with 0 where ``mask`` is False; no gradient flows there.

    Call it on the *inputs* of a computation. Selecting only at the end keeps NaN out of the value, but autograd would
    still multiply the zero gradient by the NaN derivatives upstream.

    Raises:
      ValueError: when the mask does not match the leading axes of ``x``.
    """
    if x.shape[: mask.dim()] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not match the leading axes of {tuple(x.shape)}")
    mask = mask.reshape(*mask.shape, *(1 for _ in range(x.dim() - mask.dim())))
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the scalar sum of ``x`` over the tokens where ``mask`` is True. Raises ValueError when shapes differ."""
    if x.shape != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and values {tuple(x.shape)} differ in shape")
    return zero_masked(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Return ``sum over valid tokens / denominator``, a scalar.

    Args:
      denominator: the number of valid tokens of the *whole* batch, over all micro-batches and ranks. The parts then add
        up to the whole, and splitting a batch cannot change a gradient.

    Raises:
      ValueError: when shapes differ, or a Python ``denominator`` is not positive. (A tensor is not checked, because
        that would wait for the device.)
    """
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"the denominator is the global count of valid tokens, > 0; got {denominator}")
    return masked_sum(x, mask) / denominator
