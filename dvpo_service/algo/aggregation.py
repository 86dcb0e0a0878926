"""From per-token losses to the loss of a batch: a weight per token, so that parts add up to the whole.

Every count is an argument and counts the *whole* batch of an optimizer step, over all micro-batches and ranks. So
``weighted_sum`` can be computed on the parts of any split: the results add up to the batch's loss, and their gradients
to its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.choices import Aggregation
from dvpo_service.algo.masks import zero_masked


@torch.no_grad()
def token_weights(
    mask: Tensor,
    kind: Aggregation,
    *,
    num_tokens: float,
    num_sequences: float,
    horizon: float,
) -> Tensor:
    """Return the weight of each token in the batch's loss, [B, T] float32, 0 where ``mask`` is False.

    - "token_mean": ``1 / num_tokens``. Every token counts the same (DAPO, arXiv 2503.14476, section 3.3).
    - "seq_mean_token_mean": ``1 / (num_sequences * length)``. Every response counts the same, so a token of a long
      response counts less (GRPO, arXiv 2402.03300, Eq. 3).
    - "seq_mean_token_sum": ``1 / num_sequences``.
    - "seq_mean_token_sum_norm": ``1 / (num_sequences * horizon)``. A constant in place of the length removes GRPO's
      length bias and keeps the scale of a mean (Dr. GRPO, arXiv 2503.20783).

    Args:
      mask: [B, T] bool. Rows are whole responses; ``length`` is the number of valid tokens in a row.
      num_tokens: valid tokens of the whole batch.
      num_sequences: responses of the whole batch with at least one valid token.
      horizon: a constant of the run, such as the longest response allowed.

    Raises:
      ValueError: when the kind is unknown, the mask is not [B, T], or a count is not positive.
    """
    if mask.dim() != 2:
        raise ValueError(f"the mask is [B, T], got {tuple(mask.shape)}")
    for name, count in (("num_tokens", num_tokens), ("num_sequences", num_sequences), ("horizon", horizon)):
        if not count > 0:
            raise ValueError(f"{name} counts the whole batch and must be positive, got {count}")
    lengths = mask.sum(-1, keepdim=True).clamp(min=1).double()
    if kind == "token_mean":
        weights = torch.full_like(lengths, 1.0 / num_tokens)
    elif kind == "seq_mean_token_mean":
        weights = 1.0 / (num_sequences * lengths)
    elif kind == "seq_mean_token_sum":
        weights = torch.full_like(lengths, 1.0 / num_sequences)
    elif kind == "seq_mean_token_sum_norm":
        weights = torch.full_like(lengths, 1.0 / (num_sequences * horizon))
    else:
        raise ValueError(f"unknown aggregation {kind!r}; one of {', '.join(Aggregation.__args__)}")
    return zero_masked(weights.expand(mask.shape), mask).float()


def weighted_sum(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Return the scalar ``sum of weights * x`` over the tokens where ``mask`` is True.

    All arguments are [B, T]. NaN on padding, in ``x`` or in ``weights``, reaches neither the value nor the gradient
    with respect to ``x``. Raises ValueError when the shapes differ.
    """
    if not x.shape == weights.shape == mask.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)}, weights {tuple(weights.shape)}, mask {tuple(mask.shape)}")
    return (zero_masked(x, mask) * zero_masked(weights, mask)).sum()
