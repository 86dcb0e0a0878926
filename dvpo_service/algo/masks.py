"""Reductions over valid tokens.

They select with ``where`` and never multiply by the mask: ``0 * NaN`` is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_or_better(x: Tensor) -> Tensor:
    """bf16 and half become float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x [*mask.shape, ...]`` with 0 where ``mask`` is False; no gradient flows there.

    Call it on the *inputs* of a computation: selecting only at its end stops NaN in the value, but
    autograd would still multiply the zero gradient by the NaN derivatives upstream.
    """
    if x.shape[: mask.dim()] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not match the leading axes of {tuple(x.shape)}")
    mask = mask.reshape(*mask.shape, *(1 for _ in range(x.dim() - mask.dim())))
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum of ``x`` over the tokens where ``mask`` (same shape) is True."""
    if x.shape != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and values {tuple(x.shape)} differ in shape")
    return zero_masked(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """``sum over valid tokens / denominator``.

    ``denominator`` is the valid-token count of the *whole* batch, over all micro-batches and ranks, so
    that the parts add up to the whole and splitting a batch cannot change a gradient.

    Raises ValueError if a Python ``denominator`` is not positive (a tensor is not checked: that would
    wait for the device).
    """
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"the denominator is the global count of valid tokens, > 0; got {denominator}")
    return masked_sum(x, mask) / denominator
