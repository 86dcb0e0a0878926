"""The critic's loss: the weighted sum of the eight terms (Eq. 11 of arXiv 2512.03847), with a report per term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dvpo_service.algo import critic_terms as terms
from dvpo_service.algo.loss_spec import CriticLossSpec
from dvpo_service.algo.masks import float32_or_better, masked_mean, masked_sum, zero_masked
from dvpo_service.algo.quantile_huber import quantile_huber
from dvpo_service.algo.quantiles import ascending, quantile_levels


@dataclass(frozen=True)
class CriticLoss:
    """The loss and its terms.

    Attributes:
      total: scalar, with its gradient.
      raw: the value of each term, a detached scalar by the term's name.
      weighted: the same times the term's weight: what the term adds to ``total``.
    """

    total: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]


@dataclass(frozen=True)
class OwnTerm:
    """A term of the user's own, added to the built-in ones.

    Attributes:
      function: takes the sorted heads [B, T, H, M], the sorted targets [B, T, K] and the levels [M]; returns [B, T].
      weight: the term's weight; with 0 the term is measured but not trained on.
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: float


def critic_loss(
    z: Tensor,
    y: Tensor,
    mask: Tensor,
    spec: CriticLossSpec,
    *,
    delta: float,
    denominator: float | Tensor,
    width: float = 1.0,
    mean_shift: float | None = None,
    own_terms: Mapping[str, OwnTerm] | None = None,
) -> CriticLoss:
    """Return Eq. 11: ``sum_x weight_x * (sum over valid tokens of term_x) / denominator``.

    Args:
      z: predicted atoms [B, T, H, M], as the critic outputs them.
      y: target atoms [B, T, K]; they get no gradient.
      mask: [B, T] bool. Values where it is False, NaN included, reach neither the loss nor the gradient.
      delta: the Huber threshold, in the units of the returns.
      width: a robust width of the returns, for the bounded terms only.
      denominator: valid tokens of the whole batch, over all micro-batches and ranks. Losses, reports and gradients of
        the parts then add up to those of the whole.
      mean_shift: not used with ``shift_over="token"``; else the relu of Eq. 7 is around the *global* token mean. This
        is that mean: the sum of ``shift_sum`` over the parts / denominator. None takes the mean of this batch alone.
      own_terms: further terms by name, added like the built-in ones.

    Returns:
      The loss with every term's value. A term with weight 0 is measured too, but without autograd, so that it cannot
      touch the gradient even where it is NaN. With no valid token everything is 0.

    Raises:
      ValueError: when the shapes do not fit, or denominator, delta or width is not positive.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"the returns' width must be positive and finite, got {width}")
    z, y, mask = _check_and_clean(z, y, mask)
    own = own_terms or {}
    weights = {**spec.weights, **{name: term.weight for name, term in own.items()}}
    with torch.autocast(z.device.type, enabled=False):
        inputs = _inputs(z, y, spec, delta, width)
        raw: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        total = z.flatten()[:0].sum()  # 0 that backward() accepts, whatever z holds
        for name, value in _reduced_terms(inputs, mask, denominator, mean_shift, own).items():
            raw[name] = value.detach()
            if weights[name] > 0:
                contribution = weights[name] * value
                total = total + contribution
                weighted[name] = contribution.detach()
            else:
                weighted[name] = torch.zeros_like(raw[name])
    return CriticLoss(total, raw, weighted)


@torch.no_grad()
def shift_sum(z: Tensor, y: Tensor, mask: Tensor, spec: CriticLossSpec | None = None) -> Tensor:
    """Return the sum over valid tokens of ``mean_j y - mean_j q`` (Eq. 7 before its relu), a float64 scalar.

    Add the sums up over micro-batches and ranks, divide by the global token count, and pass the result as
    ``mean_shift`` to ``critic_loss``. With ``shift_over="batch_middle"`` in ``spec`` the atoms are cut as Eq. 7 cuts
    them; otherwise they need no sorting, because sorting cannot change a mean.
    """
    z, y, mask = _check_and_clean(z, y, mask)
    if spec is None or spec.shift_over != "batch_middle":
        return masked_sum(terms.mean_shift(z.mean(-2), y, "batch").double(), mask)
    q = ascending((ascending(z) if spec.sort_atoms else z).mean(-2))
    return masked_sum(terms.mean_shift(q, y, "batch_middle", spec.alpha, spec.beta).double(), mask)


def _check_and_clean(z: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs in float32 or better with zeros on padding.

    NaN on padding would otherwise survive a later ``where`` in the gradient.
    """
    if z.dim() != 4 or y.dim() != 3 or z.shape[:2] != y.shape[:2] or mask.shape != z.shape[:2]:
        shapes = f"z {tuple(z.shape)}, y {tuple(y.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"expected z [B,T,H,M], y [B,T,K] and mask [B,T]; got {shapes}")
    mask = mask.bool()
    z, y = float32_or_better(z), float32_or_better(y.detach())
    return zero_masked(z, mask), zero_masked(y, mask).to(z.dtype), mask


def _reduced_terms(
    inputs: terms.TermInputs,
    mask: Tensor,
    denominator: float | Tensor,
    mean_shift: float | None,
    own_terms: Mapping[str, OwnTerm],
) -> dict[str, Tensor]:
    """Return a scalar per term, the built-in ones in the order of TERMS; autograd only through those with a weight."""
    spec, reduced = inputs.spec, {}
    for name, term in terms.PER_TOKEN.items():
        with _grad_if(spec.weights[name] > 0):
            reduced[name] = masked_mean(term(inputs), mask, denominator)
            if name == "shift" and spec.shift_over != "token":
                reduced[name] = _batch_relu(reduced[name], mean_shift)
    for name, own in own_terms.items():
        with _grad_if(own.weight > 0):
            reduced[name] = masked_mean(own.function(inputs.heads, inputs.targets, inputs.levels), mask, denominator)
    return reduced


def _inputs(z: Tensor, y: Tensor, spec: CriticLossSpec, delta: float, width: float) -> terms.TermInputs:
    # A stable sort gives tied atoms the same order, and so the same subgradient, on every machine.
    heads = z.sort(dim=-1, stable=True).values if spec.sort_atoms else z
    q = heads.mean(-2)
    tails = q if spec.sort_atoms else q.sort(dim=-1, stable=True).values
    targets = y.sort(-1).values
    levels = quantile_levels(z.shape[-1], spec.quantile_levels, device=z.device, dtype=z.dtype)
    with _grad_if(spec.weights["qr"] > 0 or spec.weights["risk"] > 0):  # both terms use the same losses
        fitted = heads if spec.qr_over == "heads" else q.unsqueeze(-2)
        losses = quantile_huber(fitted, targets, levels, delta, spec.huber_unit)
    return terms.TermInputs(heads, q, tails, targets, levels, losses, spec, width)


def _grad_if(wanted: bool) -> torch.no_grad | nullcontext[None]:
    return nullcontext() if wanted else torch.no_grad()


def _batch_relu(part: Tensor, mean_shift: float | None) -> Tensor:
    """Return this batch's share ``part`` of the relu of the global mean: the sign of the global mean decides."""
    if mean_shift is None:
        return part.relu()
    return torch.zeros_like(part) if mean_shift <= 0 else part  # a NaN mean must not hide the term
