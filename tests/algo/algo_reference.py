"""A second implementation of the equations in docs/algorithm.md, written to be read: float64, loops, token by token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec


def paper_spec(**changes: Any) -> CriticLossSpec:
    settings: dict[str, Any] = {
        "alpha": 0.1,
        "beta": 0.1,
        "risk_eta": 1.0,
        "quantile_levels": "endpoint",
        "huber_unit": False,
        "sort_atoms": True,
        "qr_over": "ensemble",
        "tail_target": "tail_mean",
        "tail_spread": "variance",
        "shift_over": "token",
        "curvature": "pointwise",
        "weights": dict.fromkeys(TERMS, 1.0),
    }
    return CriticLossSpec(**(settings | changes))


def calibrated_spec(**changes: Any) -> CriticLossSpec:
    settings: dict[str, Any] = {
        "quantile_levels": "midpoint",
        "huber_unit": True,
        "qr_over": "heads",
        "tail_target": "pseudo_outcome",
        "shift_over": "batch",
        "curvature": "block",
        "weights": dict.fromkeys(TERMS, 0.1) | {"qr": 1.0, "risk": 1.0, "consist": 0.01},
    }
    return paper_spec(**(settings | changes))


def robust_spec(**changes: Any) -> CriticLossSpec:
    settings = {"tail_target": "bounded", "tail_spread": "bounded", "shift_over": "batch_middle"}
    return calibrated_spec(**(settings | changes))


class NaiveHuber(NamedTuple):
    loss: Tensor  # [..., H, M]
    slope: Tensor  # its derivative in z
    # The loss and the size of the slope without the factor |tau - 1{y < z}|: rounding is judged relative to these.
    untilted_loss: Tensor
    untilted_slope: Tensor


def quantile_huber_naive(z: Tensor, y: Tensor, levels: Tensor, delta: float, unit: bool = False) -> NaiveHuber:
    """Return Eq. 3 from every pair of z [..., H, M] and y [..., K]."""
    u = y[..., None, None, :] - z[..., None]
    tilt = (levels[:, None] - (u < 0).to(u.dtype)).abs()
    huber = torch.where(u.abs() <= delta, u * u / 2, delta * (u.abs() - delta / 2))
    clipped = u.clamp(-delta, delta)
    sums = (tilt * huber, -tilt * clipped, huber, clipped.abs())
    return NaiveHuber(*(x.mean(-1) / (delta if unit else 1.0) for x in sums))


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs)


def tail(xs: list[float], fraction: float) -> list[tuple[float, float]]:
    """Return the pairs (atom, weight) of the tail that starts at xs[0]."""
    k = min(max(fraction * len(xs), 1.0), len(xs))
    return [(x, min(max(k - i, 0.0), 1.0) / k) for i, x in enumerate(xs)]


def tail_mean(xs: list[float], fraction: float) -> float:
    return math.fsum(x * w for x, w in tail(xs, fraction))


def tail_variance(xs: list[float], fraction: float) -> float:
    centre = tail_mean(xs, fraction)
    return math.fsum(w * (x - centre) ** 2 for x, w in tail(xs, fraction))


def per_atom(atoms: list[float], y: list[float], taus: list[float], delta: float, unit: bool) -> list[float]:
    losses = []
    for a, tau in zip(atoms, taus, strict=True):
        total = 0.0
        for target in y:
            u = target - a
            h = u * u / 2 if abs(u) <= delta else delta * (abs(u) - delta / 2)
            total += abs(tau - (1.0 if target < a else 0.0)) * h
        losses.append(total / len(y) / (delta if unit else 1.0))
    return losses


def edge_low(q: list[float], fraction: float) -> tuple[float, int]:
    """Return the value at the edge of the lower tail, and the number of atoms in the tail."""
    k = max(1, round(fraction * len(q)))
    return (q[-1] if k == len(q) else (q[k - 1] + q[k]) / 2), k


def pseudo_outcome_low(q: list[float], y: list[float], fraction: float) -> float:
    v, k = edge_low(q, fraction)
    return v - mean([max(v - t, 0.0) for t in y]) / (k / len(q))


def cut(xs: list[float], low: float, high: float) -> list[float]:
    return [min(max(x, low), high) for x in xs]


def bounded_tail_low(q: list[float], y: list[float], fraction: float, width: float) -> tuple[float, float]:
    """Return the bounded Eq. 5 and the lower half of the bounded Eq. 8."""
    reach = q[len(q) // 2] - 3 * width, q[len(q) // 2] + 3 * width
    q, y = cut(q, *reach), cut(y, *reach)

    def gap(share: float) -> float:
        _, k = edge_low(q, share)
        return mean(q[:k]) - pseudo_outcome_low(q, y, share)

    return gap(fraction) ** 2 / width, (gap(fraction) - gap(fraction / 2)) ** 2 / width


def curvature(q: list[float], fraction: float, kind: str) -> float:
    """Return the second difference of the tail that starts at q[0]."""
    if kind == "pointwise":
        second = [q[i + 2] - 2 * q[i + 1] + q[i] for i in range(len(q) - 2)]
        return tail_mean(second, fraction) if second else 0.0
    size = round(min(max(fraction * len(q), 1.0), len(q))) // 3
    if size == 0:
        return 0.0
    b1, b2, b3 = (mean(q[i * size : (i + 1) * size]) for i in range(3))
    return b3 - 2 * b2 + b1


def token_terms(z: Tensor, y: Tensor, spec: CriticLossSpec, delta: float, width: float = 1.0) -> dict[str, float]:
    """Return all terms of one token from z [H, M] and y [K]; "shift" without its relu when that is over the batch."""
    heads: list[list[float]] = [sorted(h) if spec.sort_atoms else h for h in z.double().tolist()]
    targets: list[float] = sorted(y.double().tolist())
    m = len(heads[0])
    q = [mean([h[j] for h in heads]) for j in range(m)]
    tails = sorted(q)
    taus = [(j + 1) / m if spec.quantile_levels == "endpoint" else (2 * j + 1) / (2 * m) for j in range(m)]
    fitted = heads if spec.qr_over == "heads" else [q]
    losses = [per_atom(f, targets, taus, delta, spec.huber_unit) for f in fitted]
    risk = [math.exp(-spec.risk_eta * tau) for tau in taus]
    risk = [w / mean(risk) for w in risk]
    down, down_targets = [-x for x in reversed(tails)], [-x for x in reversed(targets)]
    (low_term, low_spread), (high_term, high_spread) = (
        bounded_tail_low(*tail_and_targets, width)
        for tail_and_targets in ((tails, targets, spec.alpha), (down, down_targets, spec.beta))
    )
    if spec.tail_target == "tail_mean":
        low, high = tail_mean(targets, spec.alpha), tail_mean(down_targets, spec.beta)
    else:
        low = pseudo_outcome_low(tails, targets, spec.alpha)
        high = pseudo_outcome_low(down, down_targets, spec.beta)
    if spec.shift_over == "batch_middle":
        edges = edge_low(tails, spec.alpha)[0], -edge_low(down, spec.beta)[0]
        shift = mean(cut(targets, *edges)) - mean(cut(tails, *edges))
    else:
        shift = mean(targets) - mean(q)
    bounded = spec.tail_target == "bounded"
    pairs = [(g, h) for i, g in enumerate(heads) for h in heads[i + 1 :]]
    return {
        "qr": mean([mean(x) for x in losses]),
        "risk": mean([mean([w * x for w, x in zip(risk, xs, strict=True)]) for xs in losses]),
        "cvar": low_term if bounded else (tail_mean(tails, spec.alpha) - low) ** 2,
        "gain": high_term if bounded else (tail_mean(down, spec.beta) - high) ** 2,
        "shift": max(shift, 0.0) if spec.shift_over == "token" else shift,
        "shape": low_spread + high_spread
        if spec.tail_spread == "bounded"
        else max(tail_variance(tails, spec.alpha) - tail_variance(targets, spec.alpha), 0.0)
        + max(tail_variance(down_targets, spec.beta) - tail_variance(down, spec.beta), 0.0),
        "curv": max(-curvature(tails, spec.alpha, spec.curvature), 0.0)
        + max(-curvature(tails[::-1], spec.beta, spec.curvature), 0.0),
        "consist": mean([mean([(a - b) ** 2 for a, b in zip(g, h, strict=True)]) for g, h in pairs]) if pairs else 0.0,
    }


def reference_loss(
    z: Tensor, y: Tensor, mask: Tensor, spec: CriticLossSpec, delta: float, width: float = 1.0
) -> dict[str, float]:
    """Return every raw term over the batch, and "total"."""
    tokens = [token_terms(z[b, t], y[b, t], spec, delta, width) for b, t in mask.nonzero().tolist()]
    raw = {name: mean([token[name] for token in tokens]) for name in TERMS}
    raw["shift"] = max(raw["shift"], 0.0)
    return raw | {"total": math.fsum(spec.weights[name] * raw[name] for name in TERMS)}


def reference_gae(
    rewards: list[float], values: list[float], mask: list[bool], end: float, gamma: float, lam: float | list[float]
) -> list[float]:
    """Return the advantages of one sequence and one atom as explicit sums of discounted deltas over valid tokens."""
    steps = [t for t, valid in enumerate(mask) if valid]
    following = ([values[t] for t in steps] + [end])[1:]  # empty when no token is valid
    deltas = [rewards[t] + gamma * v - values[t] for t, v in zip(steps, following, strict=True)]
    factors = [gamma * (lam[t] if isinstance(lam, list) else lam) for t in steps]
    out = [0.0] * len(mask)
    for i, t in enumerate(steps):
        out[t] = math.fsum(math.prod(factors[i:n]) * deltas[n] for n in range(i, len(steps)))
    return out


def reference_scan(b: list[float], c: list[float], start: float) -> list[float]:
    """Compute x_s = b_s + c_s x_{s-1}, one step after another."""
    out, x = [], start
    for b_s, c_s in zip(b, c, strict=True):
        x = b_s + c_s * x
        out.append(x)
    return out


def reference_cvar_advantage(prompt: list[float], z: list[float], y: list[float], k: int) -> float:
    """Return the CVaR advantage of one token.

    ``prompt`` are the ascending atoms of the first valid token, and k < M is the number of atoms in the tail.
    """
    v = (prompt[k - 1] + prompt[k]) / 2
    short_z, short_y = mean([max(v - x, 0.0) for x in z]), mean([max(v - x, 0.0) for x in y])
    return (short_z - short_y) / (k / len(prompt))


def reference_entropic_advantage(z: list[float], y: list[float], b: float) -> float:
    """Return the entropic advantage of one token."""
    c = mean(z)
    return (mean([math.exp(b * (x - c)) for x in y]) - mean([math.exp(b * (x - c)) for x in z])) / b


def reference_huber_advantage(z: list[float], y: list[float], clip: float) -> float:
    """Return the Huber advantage of one token from every pair."""
    return math.fsum(max(-clip, min(clip, target - atom)) for target in y for atom in z) / (len(y) * len(z))


def reference_win_rate(z: list[float], y: list[float]) -> float:
    """Return ``P(y > z) - P(y < z)``."""
    return sum((target > atom) - (target < atom) for target in y for atom in z) / (len(y) * len(z))


def reference_robust_advantages(
    rewards: list[float],
    values: list[float],
    mask: list[bool],
    end: float,
    gamma: float,
    lam: float,
    rho: float,
    worst: float,
    ended: bool,
) -> list[float]:
    """Return the robust GAE advantages of one sequence, computed backwards over its valid tokens."""
    out, advantage, following, last = [0.0] * len(mask), 0.0, end, True
    for t in reversed(range(len(mask))):
        if not mask[t]:
            continue
        backup = following if last and ended else (1 - rho) * following + rho * worst
        advantage = rewards[t] + gamma * backup - values[t] + gamma * lam * (1 - rho) * advantage
        out[t], following, last = advantage, values[t], False
    return out
