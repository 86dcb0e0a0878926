"""What critic and advantage know beyond the prompt: measurements within the responses to one prompt.

They take a whole batch, before it is split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def explained_variance_by_prompt(values: Tensor, returns: Tensor, mask: Tensor, prompts: Tensor) -> tuple[float, float]:
    """Return the explained variance between prompts, and within a prompt: 1 - sum of error^2 / sum of return^2.

    Between prompts, returns and errors are the means over the valid tokens of a prompt's responses, less the mean over
    the batch. Within a prompt they are those of a token less the prompt's mean. The sums of squares of the two add up
    to those of ``critic/explained_variance``. Values that depend on the prompt alone explain 0 within.

    Args:
      values, returns: [B, T].
      mask: [B, T] bool; values where it is False are never read.
      prompts: [B] int64, equal for the responses to one prompt.

    Returns:
      (between, within); NaN where the returns do not differ.
    """
    tokens = prompts.unsqueeze(1).expand(mask.shape)[mask]
    truth = returns[mask].double()
    error = truth - values[mask].double()
    truth_means, error_means = _group_means(truth, tokens), _group_means(error, tokens)
    between = _explained(error_means - error.mean(), truth_means - truth.mean())
    return between, _explained(error - error_means, truth - truth_means)


@torch.no_grad()
def clean_correlation(advantages: Tensor, clean: Tensor, mask: Tensor, prompts: Tensor) -> float:
    """Return the correlation of advantage and clean outcome over responses, both less the prompt's mean.

    It says how much of what the policy learns from is signal: 1 means that right answers to a prompt have one advantage
    and wrong ones another, 0 that the advantages are noise. Whitening does not change it.

    Args:
      advantages: [B, T]; a response's advantage is the mean over its valid tokens.
      clean: [B], the outcome without noise.
      mask: [B, T] bool; a response without a valid token does not count.
      prompts: [B] int64, equal for the responses to one prompt.

    Returns:
      In [-1, 1]; NaN where, within every prompt, all outcomes or all advantages are equal.
    """
    scored = mask.any(1)
    sums = torch.where(mask, advantages.double(), 0.0).sum(1)[scored]
    advantage, outcome = sums / mask.sum(1)[scored], clean[scored].double()
    group = prompts[scored]
    advantage, outcome = (x - _group_means(x, group) for x in (advantage, outcome))
    scale = float(advantage.square().sum() * outcome.square().sum()) ** 0.5
    return float((advantage * outcome).sum()) / scale if scale > 1e-12 else math.nan


def _explained(error: Tensor, truth: Tensor) -> float:
    total = float(truth.square().sum())
    return 1.0 - float(error.square().sum()) / total if total > 1e-12 * len(truth) else math.nan


def _group_means(x: Tensor, group: Tensor) -> Tensor:
    """Return, for each entry of x [N], the mean over the entries of its group."""
    _, number = group.unique(return_inverse=True)
    sums = torch.zeros(int(number.max()) + 1 if len(x) else 0, dtype=x.dtype, device=x.device)
    counts = torch.zeros_like(sums).index_add_(0, number, torch.ones_like(x))
    return (sums.index_add_(0, number, x) / counts)[number]
