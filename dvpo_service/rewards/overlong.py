"""Soft overlong punishment: a response that nears the length limit loses reward gradually, not all at once.

A response that is cut off scores 0 however good it was, which is noise to the policy. A slope before the limit shows
the policy that length was the problem (DAPO, arXiv 2503.14476, section 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(response_lens: Tensor, *, max_len: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Return the amounts to add to the rewards, [B] float32, from ``-factor`` to 0.

    The amount is 0 up to ``max_len - buffer`` tokens, falls linearly to ``-factor`` at ``max_len``, and stays there.

    Args:
      response_lens: [B] tokens per response, an integer dtype.
      max_len: the length limit in tokens.
      buffer: tokens before the limit over which the penalty grows.
      factor: the full penalty, in units of reward.

    Raises:
      ValueError: unless 1 <= buffer <= max_len, factor is finite and >= 0, and the lengths are [B] integers.
    """
    if not 1 <= buffer <= max_len:
        raise ValueError(f"the overlong buffer must be from 1 to max_len = {max_len} tokens, got {buffer}")
    if not 0.0 <= factor < float("inf"):
        raise ValueError(f"the overlong penalty must be finite and not negative, got {factor}")
    if response_lens.dim() != 1 or response_lens.is_floating_point() or response_lens.dtype == torch.bool:
        raise ValueError(f"lengths are [B] integers, got {tuple(response_lens.shape)} {response_lens.dtype}")
    over = (response_lens - (max_len - buffer)).clamp(0, buffer)
    return -factor * (over.double() / buffer).float()
