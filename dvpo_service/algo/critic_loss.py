"""The critic's loss: the weighted sum of the eight terms (Eq. 11) with a report per term."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dvpo_service.algo import critic_terms as terms
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec
from dvpo_service.algo.masks import float32_or_better, masked_mean, masked_sum, zero_masked
from dvpo_service.algo.quantile_huber import quantile_huber
from dvpo_service.algo.quantiles import quantile_levels


@dataclass(frozen=True)
class CriticLoss:
    """``total`` has the gradient; ``raw`` and ``weighted`` are detached scalars per term."""

    total: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]


def critic_loss(
    z: Tensor,
    y: Tensor,
    mask: Tensor,
    spec: CriticLossSpec,
    *,
    delta: float,
    denominator: float | Tensor,
    mean_shift: float | None = None,
) -> CriticLoss:
    """Eq. 11: ``sum_x weight_x * (sum over valid tokens of term_x) / denominator``.

    Args:
      z: predicted atoms [B, T, H, M], as the critic gives them.
      y: target atoms [B, T, K]; no gradient.
      mask: [B, T] bool. What stands where it is False, NaN included, reaches neither value nor gradient.
      delta: the Huber threshold, in the units of the returns.
      denominator: valid tokens of the whole batch over all micro-batches and ranks. Losses, reports and
        gradients of the parts then add up to those of the whole.
      mean_shift: only for ``shift_over="batch"``, whose relu is around the *global* token mean: that mean
        (sum of ``shift_sum`` over the parts / denominator). None takes it from this batch alone.

    Returns:
      Every term is measured, also with weight 0; such a term runs without autograd, so that it cannot
      touch the gradient even where it is NaN. With no valid token all is 0.

    Raises:
      ValueError: on shapes that do not fit, or a denominator or delta that is not positive.
    """
    z, y, mask = _check_and_clean(z, y, mask)
    with torch.autocast(z.device.type, enabled=False):
        raw: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        total = z.flatten()[:0].sum()  # 0 that backward() accepts, whatever z holds
        for name, value in _reduced_terms(z, y, mask, spec, delta, denominator, mean_shift).items():
            raw[name] = value.detach()
            if spec.weights[name] > 0:
                contribution = spec.weights[name] * value
                total = total + contribution
                weighted[name] = contribution.detach()
            else:
                weighted[name] = torch.zeros_like(raw[name])
    return CriticLoss(total, raw, weighted)


@torch.no_grad()
def shift_sum(z: Tensor, y: Tensor, mask: Tensor, spec: CriticLossSpec) -> Tensor:
    """Sum over valid tokens of ``mean_j y - mean_j q`` (Eq. 7 before its relu), float64 scalar.

    Add it up over micro-batches and ranks, divide by the global token count, and pass the result as
    ``mean_shift``. Sorting cannot change a mean, so nothing in ``spec`` but its type matters here.
    """
    z, y, mask = _check_and_clean(z, y, mask)
    return masked_sum(terms.mean_shift(z.mean(-2), y, "batch").double(), mask)


def _check_and_clean(z: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 or better, zeros on padding: NaN there would survive a later ``where`` in the gradient."""
    if z.dim() != 4 or y.dim() != 3 or z.shape[:2] != y.shape[:2] or mask.shape != z.shape[:2]:
        shapes = f"z {tuple(z.shape)}, y {tuple(y.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"expected z [B,T,H,M], y [B,T,K] and mask [B,T]; got {shapes}")
    mask = mask.bool()
    z, y = float32_or_better(z), float32_or_better(y.detach())
    return zero_masked(z, mask), zero_masked(y, mask).to(z.dtype), mask


def _reduced_terms(
    z: Tensor,
    y: Tensor,
    mask: Tensor,
    spec: CriticLossSpec,
    delta: float,
    denominator: float | Tensor,
    mean_shift: float | None,
) -> dict[str, Tensor]:
    """Scalar per term, in the order of TERMS; autograd only through those with a weight."""

    def grad_for(*names: str) -> torch.no_grad | nullcontext[None]:
        return nullcontext() if any(spec.weights[name] > 0 for name in names) else torch.no_grad()

    # Stable: among tied atoms the order, and with it the subgradient, is the same on every machine.
    heads = z.sort(dim=-1, stable=True).values if spec.sort_atoms else z
    q = heads.mean(-2)
    tails = q if spec.sort_atoms else q.sort(dim=-1, stable=True).values
    targets = y.sort(-1).values
    levels = quantile_levels(z.shape[-1], spec.quantile_levels, device=z.device, dtype=z.dtype)
    with grad_for("qr", "risk"):  # one pass serves both
        fitted = heads if spec.qr_over == "heads" else q.unsqueeze(-2)
        losses = quantile_huber(fitted, targets, levels, delta, spec.huber_unit)

    per_token = {
        "qr": lambda: terms.quantile_regression(losses),
        "risk": lambda: terms.risk_weighted(losses, levels, spec.risk_eta),
        "cvar": lambda: terms.cvar(tails, targets, spec.alpha, spec.tail_target),
        "gain": lambda: terms.upper_gain(tails, targets, spec.beta, spec.tail_target),
        "shift": lambda: terms.mean_shift(q, targets, spec.shift_over),
        "shape": lambda: terms.tail_shape(tails, targets, spec.alpha, spec.beta),
        "curv": lambda: terms.tail_curvature(tails, spec.alpha, spec.beta, spec.curvature),
        "consist": lambda: terms.head_consistency(heads),
    }
    reduced = {}
    for name in TERMS:
        with grad_for(name):
            reduced[name] = masked_mean(per_token[name](), mask, denominator)
            if name == "shift" and spec.shift_over == "batch":
                reduced[name] = _batch_relu(reduced[name], mean_shift)
    return reduced


def _batch_relu(part: Tensor, mean_shift: float | None) -> Tensor:
    """Relu of the global mean, of which ``part`` is this batch's share: the global sign opens the gate."""
    if mean_shift is None:
        return part.relu()
    return torch.zeros_like(part) if mean_shift <= 0 else part  # a NaN mean must not close it unseen
