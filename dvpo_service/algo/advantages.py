"""Targets and advantages from rewards and values (Eq. 2 of arXiv 2512.03847; LOSSES sections 2 and 4).

A masked token (padding, tool output, a failed sample) is skipped: the next valid token supplies its
predecessor's ``Z_{t+1}`` and ``A_{t+1}``, with one factor of gamma between the two. It gets 0 itself, and
nothing that stands on it, reward included, reaches any other token; whoever builds the batch puts the
outcome reward on the last *valid* token.

After the last valid token stands ``z_end``: 0 where the sequence finished, the critic's own value where it
was cut. That replaces ``done``. All results are detached, float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked


@torch.no_grad()
def distributional_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, z_end: Tensor, gamma: float, lam: float
) -> Tensor:
    """Eq. 2, elementwise in the atoms j; returns the targets ``y = Z + A``, [B, T, M].

        delta_t = r_t + gamma Z_{t+1} - Z_t
        A_t     = delta_t + gamma lam A_{t+1}

    Args:
      rewards: [B, T].
      values: atoms Z [B, T, M], sorted, so that atom j keeps its meaning from token to token.
      mask: [B, T] bool.
      z_end: atoms after the last valid token [B, M].
      gamma, lam: discount and GAE's trace parameter, in [0, 1].

    Returns:
      Targets [B, T, M], 0 where masked; for lam = 1 the discounted returns (plus ``z_end``). Not sorted:
      for 0 < lam < 1 they need not ascend. The scalar advantage is their mean over j minus that of Z.

    Raises:
      ValueError: on shapes that do not fit, or gamma or lam outside [0, 1].
    """
    values, rewards = _check(rewards, values, mask, z_end, gamma, lam)
    return zero_masked(values + _gae(rewards, values, mask, z_end.to(values), gamma, lam), mask)


@torch.no_grad()
def scalar_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, v_end: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438): ``distributional_gae`` without the atoms' axis.

    values [B, T] and v_end [B] -> (advantages [B, T], returns = values + advantages [B, T]), 0 where
    masked. On the mean atom the advantages are those of Eq. 2 exactly, for Eq. 2 is linear.

    Raises ValueError like ``distributional_gae``.
    """
    if values.dim() != 2 or v_end.dim() != 1:
        raise ValueError(f"expected values [B,T] and v_end [B], got {tuple(values.shape)}, {tuple(v_end.shape)}")
    atoms, end = values.unsqueeze(-1), v_end.unsqueeze(-1)
    atoms, rewards = _check(rewards, atoms, mask, end, gamma, lam)
    advantages = _gae(rewards, atoms, mask, end.to(atoms), gamma, lam)
    return advantages.squeeze(-1), zero_masked(atoms + advantages, mask).squeeze(-1)


@torch.no_grad()
def mixture_targets(
    rewards: Tensor, values: Tensor, mask: Tensor, z_end: Tensor, gamma: float, lam: float, seeds: Tensor
) -> Tensor:
    """Targets whose law is right for every lam (LOSSES section 4), [B, T, M] sorted ascending.

        y_tj = r_t + gamma (y_{t+1,j} if coin_tj else Z_{t+1,j}),   coin_tj ~ Bernoulli(lam)

    Eq. 2 averages quantile functions, which narrows the law; here each atom follows one of the two. The
    mean is that of Eq. 2 in expectation over the coins, and equal to it for lam 0 and 1. Each token is
    sorted once, after the whole recursion.

    Args:
      seeds: [B] int64, one per sequence. A row's coins depend on its seed and its number of valid tokens
        alone: not on the other rows, the padding, masked tokens in between, or the device.

    Raises ValueError like ``distributional_gae``, and if ``seeds`` is not [B].
    """
    values, rewards = _check(rewards, values, mask, z_end, gamma, lam)
    if seeds.shape != mask.shape[:1]:
        raise ValueError(f"need one seed for each of {mask.shape[0]} sequences, got {tuple(seeds.shape)}")
    coins = _coins(mask, values.shape[-1], lam, seeds)
    next_value = z_end.to(values)
    next_target = next_value
    targets = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t, None]
        followed = torch.where(coins[:, t], next_target, next_value)
        target = rewards[:, t, None] + gamma * followed
        targets[:, t] = torch.where(valid, target, 0.0)
        next_target = torch.where(valid, target, next_target)
        next_value = torch.where(valid, values[:, t], next_value)
    return targets.sort(-1).values


@torch.no_grad()
def whitening_sums(advantages: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) over the valid tokens, [3] float64: add up over ranks, then ``whiten``."""
    valid = zero_masked(advantages, mask).double()
    return torch.stack((mask.sum().double(), valid.sum(), valid.square().sum()))


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, sums: Tensor, eps: float = 1e-8) -> Tensor:
    """``(A - mean) / (sd + eps)`` with mean and population sd from global ``sums`` [3]; 0 where masked.

    All zeros when the advantages are all equal (sd 0) or none is valid. Float32 or better.
    """
    sums = sums.to(device=advantages.device, dtype=torch.float64)
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    sd = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    white = (zero_masked(advantages, mask).double() - mean) / (sd + eps)
    return zero_masked(white, mask).to(float32_or_better(advantages).dtype)


def _check(
    rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Values [B, T, M] and rewards [B, T] in one dtype, zeros where masked."""
    b, t, m = values.shape if values.dim() == 3 else (-1, -1, -1)
    if rewards.shape != (b, t) or mask.shape != (b, t) or end.shape != (b, m):
        shapes = f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"expected [B,T], [B,T,M], [B,T] and an end [B,M]; got {shapes}, {tuple(end.shape)}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma and lambda must be in [0, 1], got {gamma} and {lam}")
    values = zero_masked(float32_or_better(values), mask)
    return values, zero_masked(rewards.to(values.dtype), mask)


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [B, T, M], 0 where masked, by the backward recursion over T."""
    next_value, next_advantage = end, torch.zeros_like(end)
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t, None]
        delta = rewards[:, t, None] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0.0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
    return advantages


def _coins(mask: Tensor, m: int, lam: float, seeds: Tensor) -> Tensor:
    """Bernoulli(lam) [B, T, M] bool: drawn on the CPU row by row, for the valid tokens only."""
    coins = torch.zeros(*mask.shape, m, dtype=torch.bool)
    valid = mask.cpu()
    for row, seed in enumerate(seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        coins[row, valid[row]] = torch.rand(int(valid[row].sum()), m, generator=generator) < lam
    return coins.to(mask.device)
