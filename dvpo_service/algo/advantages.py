"""Targets and advantages from rewards and values (Eq. 2 of arXiv 2512.03847; docs/algorithm.md).

A masked token (padding, tool output, a failed sample) is skipped: the valid token before it takes ``Z_{t+1}`` and
``A_{t+1}`` from the next valid token, with one factor of gamma between the two. The masked token gets 0, and its
contents, the reward included, reach no other token. Whoever builds the batch must therefore put the outcome reward on
the last *valid* token.

``z_end`` is the value after the last valid token: 0 where the sequence finished, and the critic's own value where the
sequence was cut. It replaces a ``done`` flag.

``lam`` is a number in [0, 1], or a tensor [B, T] or [B, 1] of such numbers. ``lam_t`` multiplies the trace from token t
to the next valid token. The values in a tensor are not checked, because that would wait for the device.

All results are detached and float32 or better. Each row of a result depends on that row's valid tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked
from dvpo_service.algo.quantiles import ascending
from dvpo_service.algo.scan import LastFirst, linear_scan


@torch.no_grad()
def distributional_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, z_end: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Return the targets ``y = Z + A`` of Eq. 2, computed for each atom j by itself.

        delta_t = r_t + gamma Z_{t+1} - Z_t
        A_t     = delta_t + gamma lam_t A_{t+1}

    The code computes the equal expression ``y_t = r_t + gamma ((1 - lam_t) Z_{t+1} + lam_t y_{t+1})``. It avoids the
    rounding of ``Z_t``, so that for lam = 1 the targets do not depend on Z at all.

    Args:
      rewards: [B, T].
      values: atoms Z [B, T, M], sorted, so that atom j keeps its meaning from token to token.
      mask: [B, T] bool.
      z_end: atoms after the last valid token [B, M].
      gamma: discount, in [0, 1].
      lam: GAE's trace parameter, in [0, 1]; a number, or one per token (see the module's docstring).

    Returns:
      Targets [B, T, M], 0 where masked. For lam = 1 they are the discounted returns (plus the discounted ``z_end``).
      They are not sorted: for 0 < lam < 1 they need not ascend. The scalar advantage is the targets' mean over j minus
      the mean of Z over j.

    Raises:
      ValueError: when the shapes do not fit, or gamma or a number lam is outside [0, 1].
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
    """Return the advantages and returns of GAE (arXiv 1506.02438): ``distributional_gae`` without the atoms' axis.

    Given the mean atom as the value, the advantages are the mean over atoms of Eq. 2's, because Eq. 2 is linear. They
    are summed from the deltas. So every advantage is exactly 0 where every delta is 0, and whitening cannot blow up a
    rounding error.

    Args:
      values: [B, T].
      v_end: [B], the value after the last valid token.

    Returns:
      (advantages, returns = values + advantages), both [B, T] and 0 where masked.

    Raises:
      ValueError: as ``distributional_gae`` does.
    """
    values, rewards, lam = check_inputs(rewards, values, mask, v_end, gamma, lam, axes=2)
    order = LastFirst(mask)
    following = order.pack_following(values, v_end.to(values))
    return packed_gae(order, rewards, values, gamma * following, gamma * order.pack(lam))


def packed_gae(
    order: LastFirst, rewards: Tensor, values: Tensor, backup: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve ``A_t = r_t + backup_t - V_t + decay_t A_{t+1}``, the recursion that all scalar estimators share.

    Args:
      order: the order of the valid tokens.
      rewards, values: [B, T] in token order.
      backup: [B, T] in slot order, the discounted value of what follows the token.
      decay: [B, T] in slot order.

    Returns:
      (advantages, returns = values + advantages), both [B, T] in token order and 0 where masked.
    """
    deltas = order.pack(rewards) + backup - order.pack(values)
    advantages = order.unpack(linear_scan(deltas, decay, deltas.new_zeros(len(deltas))))
    return advantages, zero_masked(values + advantages, order.mask)


def check_inputs(
    rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float | Tensor, axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, rewards and lambda in one dtype, float32 or better.

    The values are [B, T, M] for ``axes`` = 3 and [B, T] for ``axes`` = 2; rewards and lambda are [B, T].

    Raises:
      ValueError: when the shapes do not fit, or gamma or a number lam is outside [0, 1].
    """
    bt = mask.shape
    end_shape = values.shape[:1] + values.shape[2:]
    if values.dim() != axes or values.shape[:2] != bt or rewards.shape != bt or end.shape != end_shape:
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
    """Return each token's reward plus the discounted later rewards, [B, T], 0 where masked.

    ``unsqueeze(-1)`` turns the result into point targets [B, T, 1]. ``distributional_gae`` returns the same numbers M
    times over for lam = 1 and ``z_end`` = 0. Raises ValueError as ``distributional_gae`` does.
    """
    zeros = torch.zeros_like(float32_or_better(rewards))
    returns, _ = scalar_gae(rewards, zeros, mask, zeros.new_zeros(len(zeros)), gamma, 1.0)
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
    """Return targets whose distribution is right for every lam (docs/algorithm.md, "Targets").

        y_tj = r_t + gamma (y_{t+1,j} if coin_tj else Z_{t+1,j}),   coin_tj ~ Bernoulli(lam_t)

    Eq. 2 averages two quantile functions, which narrows the distribution; here each atom follows one of the two. The
    mean over atoms equals Eq. 2's in expectation over the coins, and exactly for lam 0 and 1. Each token is sorted
    once, after the whole recursion.

    Args:
      seeds: [B] int64, one per sequence. A row's coins depend on its seed and its number of valid tokens only, not on
        the other rows, the padding, masked tokens in between, or the device.

    Returns:
      Targets [B, T, M], sorted ascending, 0 where masked.

    Raises:
      ValueError: as ``distributional_gae`` does, and when ``seeds`` is not [B].
    """
    values, rewards, lam = check_inputs(rewards, values, mask, z_end, gamma, lam, axes=3)
    if seeds.shape != mask.shape[:1]:
        raise ValueError(f"need one seed for each of {mask.shape[0]} sequences, got {tuple(seeds.shape)}")
    order, z_end = LastFirst(mask), z_end.to(values)
    coins = _coins(mask, values.shape[-1], order.pack(lam), seeds)
    # The recurrence of Eq. 2 with a coefficient per atom: gamma where the coin follows the target, else 0.
    backup = order.pack_following(values, z_end).masked_fill_(coins, 0).mul_(gamma)
    backup.add_(order.pack(rewards).unsqueeze(-1))
    return order.unpack(ascending(linear_scan(backup, coins.to(values.dtype).mul_(gamma), z_end)))


@torch.no_grad()
def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Return VAPO's ``lambda = 1 - 1 / (alpha l)``, where l counts a sequence's valid tokens.

    The paper is arXiv 2504.05118; it uses alpha 0.05. ``mask`` is [B, T] bool. The result is [B, 1] float32 in [0, 1],
    and 0 for sequences of up to ``1 / alpha`` tokens. Raises ValueError unless alpha > 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    length = mask.sum(1, keepdim=True).clamp(min=1)
    return (1 - 1 / (alpha * length.double())).clamp(0, 1).float()


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Return ``(A - mean) / (sd + eps)``, [B, T], float32 or better, 0 where masked.

    Mean and population sd are over all valid tokens of the (whole) batch. The result is exactly 0 where the advantages
    are all equal or no token is valid: one of them is subtracted before anything is added up.
    """
    values = zero_masked(advantages, mask).double()
    valid = values[mask]
    if valid.numel() == 0:
        return torch.zeros_like(values).to(float32_or_better(advantages).dtype)
    deviation = values - valid[0]
    deviation = deviation - deviation[mask].mean()
    sd = deviation[mask].square().mean().sqrt()
    return zero_masked(deviation / (sd + eps), mask).to(float32_or_better(advantages).dtype)


def _coins(mask: Tensor, m: int, trace: Tensor, seeds: Tensor) -> Tensor:
    """Return Bernoulli(trace) draws [B, T, M] bool in slot order, drawn on the CPU for each row's valid tokens only."""
    coins = torch.zeros(*mask.shape, m, dtype=torch.bool)
    trace = trace.cpu().unsqueeze(-1)
    for row, (seed, valid) in enumerate(zip(seeds.tolist(), mask.sum(1).tolist(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        coins[row, :valid] = torch.rand(valid, m, generator=generator) < trace[row, :valid]
    return coins.to(mask.device)
