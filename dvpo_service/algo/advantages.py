"""Targets and advantages from rewards and values (Eq. 2 of arXiv 2512.03847; LOSSES sections 2 and 4).

A masked token (padding, tool output, a failed sample) is skipped: the next valid token supplies its
predecessor's ``Z_{t+1}`` and ``A_{t+1}``, with one factor of gamma between the two. It gets 0 itself, and
nothing that stands on it, reward included, reaches any other token; whoever builds the batch puts the
outcome reward on the last *valid* token.

After the last valid token stands ``z_end``: 0 where the sequence finished, the critic's own value where it
was cut. That replaces ``done``.

``lam`` is a number in [0, 1], or a tensor [B, T] (or [B, 1]) of such, where ``lam_t`` multiplies the trace
from t to the next valid token; the values in a tensor are not checked: that would wait for the device.

All results are detached, float32 or better, and each row of them depends on that row's valid tokens alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked
from dvpo_service.algo.scan import LastFirst, linear_scan


@torch.no_grad()
def distributional_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, z_end: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Eq. 2, elementwise in the atoms j; returns the targets ``y = Z + A``, [B, T, M].

        delta_t = r_t + gamma Z_{t+1} - Z_t
        A_t     = delta_t + gamma lam_t A_{t+1}

    computed as ``y_t = r_t + gamma ((1 - lam_t) Z_{t+1} + lam_t y_{t+1})``: the same, without the rounding of
    ``Z_t``, so that for lam = 1 nothing of Z is left.

    Args:
      rewards: [B, T].
      values: atoms Z [B, T, M], sorted, so that atom j keeps its meaning from token to token.
      mask: [B, T] bool.
      z_end: atoms after the last valid token [B, M].
      gamma: discount, in [0, 1].
      lam: GAE's trace parameter, in [0, 1]; a number, or per token (see above).

    Returns:
      Targets [B, T, M], 0 where masked; for lam = 1 the discounted returns (plus ``z_end``). Not sorted:
      for 0 < lam < 1 they need not ascend. The scalar advantage is their mean over j minus that of Z.

    Raises:
      ValueError: on shapes that do not fit, or gamma or a number lam outside [0, 1].
    """
    values, rewards, lam = check_inputs(rewards, values, mask, z_end, gamma, lam, axes=3)
    order, z_end = LastFirst(mask), z_end.to(values)
    trace = order.pack(lam).unsqueeze(-1)
    backup = order.pack_following(values, z_end).mul_(gamma * (1 - trace)).add_(order.pack(rewards).unsqueeze(-1))
    return order.unpack(linear_scan(backup, gamma * trace, z_end))


@torch.no_grad()
def scalar_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, v_end: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438): ``distributional_gae`` without the atoms' axis.

    values [B, T] and v_end [B] -> (advantages [B, T], returns = values + advantages [B, T]), 0 where
    masked. On the mean atom the advantages are those of Eq. 2, for Eq. 2 is linear. They are summed from
    the deltas: where every delta is 0 so is every advantage, and whitening finds no rounding to blow up.

    Raises ValueError like ``distributional_gae``.
    """
    values, rewards, lam = check_inputs(rewards, values, mask, v_end, gamma, lam, axes=2)
    order = LastFirst(mask)
    following = order.pack_following(values, v_end.to(values))
    return packed_gae(order, rewards, values, gamma * following, gamma * order.pack(lam))


def packed_gae(
    order: LastFirst, rewards: Tensor, values: Tensor, backup: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """``A_t = r_t + backup_t - V_t + decay_t A_{t+1}``: what the scalar estimators have in common.

    rewards and values [B, T] in token order; backup (the discounted value that follows) and decay [B, T]
    in slot order. Returns (advantages, returns = values + advantages), [B, T] in token order, 0 where masked.
    """
    deltas = order.pack(rewards) + backup - order.pack(values)
    advantages = order.unpack(linear_scan(deltas, decay, deltas.new_zeros(len(deltas))))
    return advantages, zero_masked(values + advantages, order.mask)


def check_inputs(
    rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float | Tensor, axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, T, M] (``axes`` = 3) or [B, T] (2), rewards and lambda [B, T], in one dtype, float32 or better.

    Raises ValueError on shapes that do not fit, or gamma or a number lam outside [0, 1].
    """
    bt = mask.shape
    follows = values.shape[:1] + values.shape[2:]
    if values.dim() != axes or values.shape[:2] != bt or rewards.shape != bt or end.shape != follows:
        wanted = "values [B,T,M] and z_end [B,M]" if axes == 3 else "values [B,T] and v_end [B]"
        got = ", ".join(str(tuple(x.shape)) for x in (rewards, mask, values, end))
        raise ValueError(f"expected rewards and mask [B,T], {wanted}; got {got}")
    if isinstance(lam, Tensor) and lam.shape not in (bt, (bt[0], 1)):
        raise ValueError(f"lambda is a number, [B,T] or [B,1] for {tuple(bt)}, got {tuple(lam.shape)}")
    if not 0.0 <= gamma <= 1.0 or not (isinstance(lam, Tensor) or 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma and lambda must be in [0, 1], got {gamma} and {lam}")
    values = float32_or_better(values)
    trace = lam.to(values).expand(bt) if isinstance(lam, Tensor) else values.new_full(bt, lam)
    return values, rewards.to(values.dtype), trace


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """A token's reward plus the discounted later ones, [B, T] -> [B, T], 0 where masked.

    ``unsqueeze(-1)`` makes point targets [B, T, 1] of them: what ``distributional_gae`` repeats M times for
    lam = 1 and ``z_end`` = 0. Raises ValueError like ``distributional_gae``.
    """
    nothing = torch.zeros_like(float32_or_better(rewards))
    returns, _ = scalar_gae(rewards, nothing, mask, nothing.new_zeros(len(nothing)), gamma, 1.0)
    return returns


@torch.no_grad()
def mixture_targets(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    z_end: Tensor,
    gamma: float,
    lam: float | Tensor,
    seeds: Tensor,
) -> Tensor:
    """Targets whose law is right for every lam (LOSSES section 4), [B, T, M] sorted ascending.

        y_tj = r_t + gamma (y_{t+1,j} if coin_tj else Z_{t+1,j}),   coin_tj ~ Bernoulli(lam_t)

    Eq. 2 averages quantile functions, which narrows the law; here each atom follows one of the two. The
    mean is that of Eq. 2 in expectation over the coins, and equal to it for lam 0 and 1. Each token is
    sorted once, after the whole recursion.

    Args:
      seeds: [B] int64, one per sequence. A row's coins depend on its seed and its number of valid tokens
        alone: not on the other rows, the padding, masked tokens in between, or the device.

    Raises ValueError like ``distributional_gae``, and if ``seeds`` is not [B].
    """
    values, rewards, lam = check_inputs(rewards, values, mask, z_end, gamma, lam, axes=3)
    if seeds.shape != mask.shape[:1]:
        raise ValueError(f"need one seed for each of {mask.shape[0]} sequences, got {tuple(seeds.shape)}")
    order, z_end = LastFirst(mask), z_end.to(values)
    coins = _coins(mask, values.shape[-1], order.pack(lam), seeds)
    # The recurrence of Eq. 2 with a coefficient per atom: gamma where the coin follows the target, else 0.
    backup = order.pack_following(values, z_end).masked_fill_(coins, 0).mul_(gamma)
    backup.add_(order.pack(rewards).unsqueeze(-1))
    return order.unpack(_sorted(linear_scan(backup, coins.to(values.dtype).mul_(gamma), z_end)))


@torch.no_grad()
def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """VAPO's ``lambda = 1 - 1 / (alpha l)``, l a sequence's valid tokens (arXiv 2504.05118, alpha 0.05).

    [B, T] bool -> [B, 1] float32 in [0, 1]; 0 for sequences of up to ``1 / alpha`` tokens.

    Raises ValueError unless alpha > 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    length = mask.sum(1, keepdim=True).clamp(min=1)
    return (1 - 1 / (alpha * length.double())).clamp(0, 1).float()


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


def _coins(mask: Tensor, m: int, trace: Tensor, seeds: Tensor) -> Tensor:
    """Bernoulli(trace) [B, T, M] bool in slot order: drawn on the CPU row by row, for the valid tokens only."""
    coins, trace = torch.zeros(*mask.shape, m, dtype=torch.bool), trace.cpu().unsqueeze(-1)
    for row, (seed, valid) in enumerate(zip(seeds.tolist(), mask.sum(1).tolist(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        coins[row, :valid] = torch.rand(valid, m, generator=generator) < trace[row, :valid]
    return coins.to(mask.device)


def _sorted(atoms: Tensor) -> Tensor:
    """``atoms`` [..., M] ascending. On the CPU by NumPy, whose vectorised sort (it keeps no indices) is tens of
    times faster than torch's and was most of the time spent here.
    """
    if atoms.device.type == "cpu":
        return torch.from_numpy(np.sort(atoms.numpy(), axis=-1))
    return atoms.sort(-1).values
