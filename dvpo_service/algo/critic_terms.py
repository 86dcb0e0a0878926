"""The critic's loss terms, one pure function per equation of arXiv 2512.03847 (docs/algorithm.md has the equations).

``heads [..., H, M]`` are the predicted atoms, ``q [..., M]`` their mean over heads, ``y [..., K]`` the target atoms.
The tail functions take ``q`` and ``y`` sorted ascending along the last axis. Every function returns one number per
token, [...], in the dtype of its inputs, which should be float32 or better. The gradient flows to the prediction; the
caller detaches ``y``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dvpo_service.algo.choices import Curvature, ShiftOver, TailSpread, TailTarget
from dvpo_service.algo.loss_spec import CriticLossSpec
from dvpo_service.algo.quantiles import (
    lower_tail_mean,
    lower_tail_variance,
    tail_size,
    tail_weights,
    upper_tail_variance,
)

REACH = 3.0  # in widths; a normal distribution has 99.7 % of its probability within


def quantile_regression(losses: Tensor) -> Tensor:
    """Eq. 3: ``mean_i l_i``, also over heads; ``losses [..., H, M]`` come from ``quantile_huber``."""
    return losses.mean((-2, -1))


def risk_weights(levels: Tensor, eta: float) -> Tensor:
    """Eq. 4: ``w_i = exp(-eta tau_i) / mean_k exp(-eta tau_k)``, [M], mean 1, larger for lower quantiles.

    eta = 0 gives ones. Computed as a softmax: no eta overflows.
    """
    return torch.softmax(-eta * levels, dim=-1) * levels.shape[-1]


def risk_weighted(losses: Tensor, levels: Tensor, eta: float) -> Tensor:
    """Eq. 4: ``mean_i w_i l_i``, also over heads; ``losses [..., H, M]``, ``levels [M]``."""
    return (losses * risk_weights(levels.to(losses), eta)).mean((-2, -1))


def cvar(q: Tensor, y: Tensor, alpha: float, target: TailTarget, width: float = 1.0) -> Tensor:
    """Eq. 5: ``(lower tail mean of q - t)^2``.

    "tail_mean": ``t`` is the tail mean of ``y``, as in the paper; biased when ``y`` is a sample.
    "pseudo_outcome": ``t = v - mean_j (v - y_j)_+ / alpha``, whose expectation is the tail mean of the distribution
    that ``y`` is drawn from when ``v`` is its alpha-quantile (Rockafellar and Uryasev 2000).
    "bounded": the pseudo-outcome of ``q`` and ``y`` within reach (see ``within_reach``), and the square is divided by
    ``width``, so that the term has the units of Eq. 3 and its slope a bound.
    """
    if target == "tail_mean":
        t = lower_tail_mean(y, alpha)
    elif target == "pseudo_outcome":
        t = _pseudo_outcome(q.detach(), y, alpha)
    elif target == "bounded":
        q, y = within_reach(q, y, width)
        return _tail_gap(q, y, alpha).square() / width
    else:
        raise ValueError(f"tail target is 'tail_mean', 'pseudo_outcome' or 'bounded', got {target!r}")
    return (lower_tail_mean(q, alpha) - t).square()


def upper_gain(q: Tensor, y: Tensor, beta: float, target: TailTarget, width: float = 1.0) -> Tensor:
    """Eq. 6: Eq. 5 at the top, ``t = v + mean_j (y_j - v)_+ / beta``. Computed on the mirrored atoms."""
    return cvar(-q.flip(-1), -y.flip(-1), beta, target, width)


def mean_shift(q: Tensor, y: Tensor, over: ShiftOver, alpha: float = 0.1, beta: float = 0.1) -> Tensor:
    """Eq. 7: ``relu(mean_j y_j - mean_j q_j)`` ("token").

    With "batch" the relu goes around the mean over all tokens, which is the caller's to take: this returns
    the bare difference. "batch_middle" does so with atoms and targets cut at the edges of the tails of ``q``, which
    must then be sorted: a wild reward counts like one at the edge.
    """
    if over == "batch_middle":
        low, high = _edge(q.detach(), alpha), -_edge(-q.detach().flip(-1), beta)
        q, y = (x.clamp(low.unsqueeze(-1), high.unsqueeze(-1)) for x in (q, y))
    elif over not in ("token", "batch"):
        raise ValueError(f"the mean shift is over 'token', 'batch' or 'batch_middle', got {over!r}")
    gap = y.mean(-1) - q.mean(-1)
    return gap.relu() if over == "token" else gap


def tail_shape(
    q: Tensor, y: Tensor, alpha: float, beta: float, spread: TailSpread = "variance", width: float = 1.0
) -> Tensor:
    """Eq. 8: the tails' spread; 0 for tails of one atom.

    "variance": ``relu(var_low(q) - var_low(y)) + relu(var_high(y) - var_high(q))``, as in the paper. It is biased when
    ``y`` is a sample, and with targets that hold the critic's own atoms its upper tail only widens.
    "bounded": the spread is the distance between the mean of a tail and the mean of its outer half. Both are compared
    by pseudo-outcomes, as in Eq. 5, so that the difference is 0 on average where ``y`` is drawn from the predicted
    distribution; its square is divided by ``width`` (see ``within_reach``).
    """
    if spread == "bounded":
        low = _spread_gap(*within_reach(q, y, width), alpha)
        high = _spread_gap(*within_reach(-q.flip(-1), -y.flip(-1), width), beta)
        return (low.square() + high.square()) / width
    if spread != "variance":
        raise ValueError(f"the tail's spread is 'variance' or 'bounded', got {spread!r}")
    low = lower_tail_variance(q, alpha) - lower_tail_variance(y, alpha)
    high = upper_tail_variance(y, beta) - upper_tail_variance(q, beta)
    return low.relu() + high.relu()


def tail_curvature(q: Tensor, alpha: float, beta: float, kind: Curvature) -> Tensor:
    """Eq. 9: ``relu(-c_low) + relu(-c_high)``: contracts the lower tail, extends the upper one.

    A long lower tail has negative second differences, a long upper one positive.
    "pointwise": ``c`` is the mean second difference over the tail; 0 with fewer than 3 atoms in all.
    "block": ``c = b3 - 2 b2 + b1`` from the means of the tail's three thirds, the outermost atoms kept;
    0 with fewer than 3 atoms in the tail.
    """
    if kind == "pointwise":
        low, high = _mean_second_difference(q, alpha), _mean_second_difference(q.flip(-1), beta)
    elif kind == "block":
        low, high = _block_difference(q, alpha), _block_difference(q.flip(-1), beta)
    else:
        raise ValueError(f"curvature is 'pointwise' or 'block', got {kind!r}")
    return (-low).relu() + (-high).relu()


def head_consistency(heads: Tensor) -> Tensor:
    """Eq. 10: squared difference, mean over the H(H-1)/2 head pairs and the atoms; [..., H, M] -> [...].

    Equals twice the unbiased variance over heads (not summed over M); 0 for one head.
    """
    if heads.shape[-2] < 2:
        return torch.zeros_like(heads[..., 0, 0])
    return 2 * heads.var(-2, unbiased=True).mean(-1)


def within_reach(q: Tensor, y: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Return ``q`` and ``y`` cut to within ``REACH`` widths of the median of ``q``; atoms cut off get no gradient.

    Both are cut, so that terms which compare them stay unbiased. Nothing beyond counts, however far away it is.
    """
    median = q.detach()[..., q.shape[-1] // 2, None]
    low, high = median - REACH * width, median + REACH * width
    return q.clamp(low, high), y.clamp(low, high)


def _pseudo_outcome(q: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``v - mean_j (v - y_j)_+ / a`` with a = k/M and v half-way across the edge of the k lowest atoms.

    k = round(alpha M) within [1, M] (Python's round: halves to even); where k = M, v is the last atom.
    """
    m, v = q.shape[-1], _edge(q, alpha)
    return v - (v.unsqueeze(-1) - y).relu().mean(-1) * (m / round(tail_size(m, alpha)))


def _edge(q: Tensor, alpha: float) -> Tensor:
    """Return the value half-way across the edge of the k = round(alpha M) lowest atoms; where k = M, the last atom."""
    m = q.shape[-1]
    k = round(tail_size(m, alpha))
    return q[..., -1] if k == m else (q[..., k - 1] + q[..., k]) / 2


def _tail_gap(q: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Return the mean of the k lowest atoms minus its pseudo-outcome, with the gradient of the former."""
    k = round(tail_size(q.shape[-1], alpha))
    return q[..., :k].mean(-1) - _pseudo_outcome(q.detach(), y, alpha)


def _spread_gap(q: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Return by how much the tail's spread is larger than its pseudo-outcome; 0 for a tail of one atom."""
    return _tail_gap(q, y, alpha) - _tail_gap(q, y, alpha / 2)


def _mean_second_difference(q: Tensor, fraction: float) -> Tensor:
    """Mean of ``q_{i+2} - 2 q_{i+1} + q_i`` from the first atom inwards, tail weights over the M - 2."""
    if q.shape[-1] < 3:
        return torch.zeros_like(q[..., 0])
    second = q.diff(n=2, dim=-1)
    weights = tail_weights(second.shape[-1], fraction, device=q.device, dtype=q.dtype)
    return (second * weights).sum(-1)


def _block_difference(q: Tensor, fraction: float) -> Tensor:
    """``b3 - 2 b2 + b1`` of blocks of ``round(k) // 3`` atoms from the first atom inwards."""
    size = round(tail_size(q.shape[-1], fraction)) // 3
    if size == 0:
        return torch.zeros_like(q[..., 0])
    b1, b2, b3 = (block.mean(-1) for block in q[..., : 3 * size].split(size, dim=-1))
    return b3 - 2 * b2 + b1


@dataclass(frozen=True)
class TermInputs:
    """What a term may look at; padding is 0.

    Attributes:
      heads: predicted atoms [B, T, H, M], sorted along M if the spec says so.
      q: their mean over heads [B, T, M].
      tails: ``q`` sorted along M.
      targets: target atoms [B, T, K], sorted along K, detached.
      levels: quantile levels of the atoms [M].
      losses: quantile Huber losses [B, T, H or 1, M] of Eq. 3.
      width: of the returns, for the bounded terms.
    """

    heads: Tensor
    q: Tensor
    tails: Tensor
    targets: Tensor
    levels: Tensor
    losses: Tensor
    spec: CriticLossSpec
    width: float


# A built-in term is its function above, its row here and one in ``loss_spec.TERMS``. Each returns [B, T].
PER_TOKEN: Mapping[str, Callable[[TermInputs], Tensor]] = {
    "qr": lambda x: quantile_regression(x.losses),
    "risk": lambda x: risk_weighted(x.losses, x.levels, x.spec.risk_eta),
    "cvar": lambda x: cvar(x.tails, x.targets, x.spec.alpha, x.spec.tail_target, x.width),
    "gain": lambda x: upper_gain(x.tails, x.targets, x.spec.beta, x.spec.tail_target, x.width),
    "shift": lambda x: mean_shift(x.tails, x.targets, x.spec.shift_over, x.spec.alpha, x.spec.beta),
    "shape": lambda x: tail_shape(x.tails, x.targets, x.spec.alpha, x.spec.beta, x.spec.tail_spread, x.width),
    "curv": lambda x: tail_curvature(x.tails, x.spec.alpha, x.spec.beta, x.spec.curvature),
    "consist": lambda x: head_consistency(x.heads),
}
