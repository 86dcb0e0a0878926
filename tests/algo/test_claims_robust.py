"""Claims about the robust form: a few wild rewards rule neither a term nor its gradient, nor the learned quantiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algo_reference import calibrated_spec, robust_spec
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import mixture_targets
from dvpo_service.algo.critic_loss import critic_loss, shift_sum
from dvpo_service.algo.loss_spec import TERMS
from dvpo_service.algo.robust_width import add_batch, no_widths, running_width
from dvpo_service.config import AlgorithmConfig

T, B, M, STEPS = 2, 64, 40, 250
LEVELS = (torch.arange(M, dtype=torch.float64) + 0.5) / M


def uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(B, generator=generator, dtype=torch.float64)


def coin(generator: torch.Generator) -> Tensor:
    return (uniform(generator) < 0.7).double()


def spikes(generator: torch.Generator, share: float, sign: int) -> Tensor:
    """Return N(0, 20) with probability ``share``, else 0; with ``sign`` 1 or -1 folded to that side."""
    size = 20 * torch.randn(B, generator=generator, dtype=torch.float64)
    return torch.where(uniform(generator) < share, size if sign == 0 else sign * size.abs(), 0.0)


def learned_quantiles(form: str, reward: Any, *, share: float = 0.05, sign: int = 0) -> Tensor:
    """Return the quantiles [T, M] that a tabular critic learns on a chain of T tokens with the reward at its end."""
    config = AlgorithmConfig.model_validate({"form": form, "n_quantiles": M, "n_heads": 1})
    generator, spec = torch.Generator().manual_seed(0), config.critic_loss_spec()
    atoms = torch.nn.Parameter(0.1 * torch.randn(T, 1, M, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.Adam([atoms], lr=0.05, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    mask, widths, returns, last = torch.ones(B, T, dtype=torch.bool), no_widths(), [], []
    for step in range(STEPS):
        rewards = torch.zeros(B, T, dtype=torch.float64)
        rewards[:, -1] = reward(generator) + spikes(generator, share, sign)
        widths = add_batch(widths, rewards[:, -1])
        returns.append(rewards[:, -1])
        unit = running_width(widths) if form == "robust" else float(torch.cat(returns).std())
        values = atoms.detach()[:, 0].sort(-1).values.expand(B, T, M)
        seeds = torch.arange(B) + step * B
        targets = mixture_targets(rewards, values, mask, torch.zeros(B, M), 1.0, 0.95, seeds)
        z = atoms.expand(B, T, 1, M)
        loss = critic_loss(
            *(z, targets, mask, spec),
            delta=config.huber_delta * unit,
            width=running_width(widths),
            denominator=B * T,
            mean_shift=float(shift_sum(z, targets, mask, spec)) / (B * T),
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        decay.step()
        if 4 * step >= 3 * STEPS:
            last.append(atoms.detach()[:, 0].sort(-1).values)
    return torch.stack(last).mean(0)


def largest_error(quantiles: Tensor, clean: Tensor) -> float:
    """Return the largest distance to the clean quantiles between the levels 10 % and 90 %, at any token.

    A quantile within 5 % of the level at which a coin's quantiles jump is not compared.
    """
    compared = (LEVELS >= 0.1) & (LEVELS <= 0.9)
    if set(clean.tolist()) == {0.0, 1.0}:
        compared &= (LEVELS - 0.3).abs() > 0.05
    return float((quantiles - clean)[:, compared].abs().max())


CLEAN = {"coin": (coin, (LEVELS > 0.3).double()), "uniform": (uniform, LEVELS)}


@pytest.mark.parametrize("sign", [0, -1])
@pytest.mark.parametrize("reward", CLEAN)
def test_under_5_percent_of_spikes_the_robust_form_learns_the_clean_quantiles(reward: str, sign: int) -> None:
    draw, clean = CLEAN[reward]
    assert largest_error(learned_quantiles("robust", draw, sign=sign), clean) < 0.05


def test_the_calibrated_form_does_not() -> None:
    draw, clean = CLEAN["coin"]
    assert largest_error(learned_quantiles("calibrated", draw), clean) > 0.1


def test_without_spikes_the_robust_form_learns_them_too() -> None:
    draw, clean = CLEAN["uniform"]
    assert largest_error(learned_quantiles("robust", draw, share=0.0), clean) < 0.04


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, 2, M, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 3, M, generator=generator, dtype=torch.float64)
    return z, y, torch.ones(2, 3, dtype=torch.bool)


def gradient(spec: Any, z: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic_loss(z, y, mask, spec, delta=0.05, denominator=6).total, z)
    return slope


@pytest.mark.parametrize("sign", [1, -1])
def test_a_wild_target_has_a_gradient_that_does_not_grow_with_it(sign: int) -> None:
    z, y, mask = batch()
    slopes = {}
    for size in (1e2, 1e4, 1e8):
        y[0, 0, 0] = sign * size
        slopes[size] = [gradient(spec, z, y, mask) for spec in (robust_spec(), calibrated_spec())]
    assert_close(slopes[1e8][0], slopes[1e2][0], rtol=1e-9, atol=1e-12)
    assert slopes[1e4][1].abs().max() > 50 * slopes[1e2][1].abs().max()


def test_the_terms_of_the_robust_form_have_the_unit_of_the_reward() -> None:
    """Except for Eq. 10, a square: so the weights mean the same whatever the reward's scale."""
    z, y, mask = batch()
    spec = robust_spec(weights=dict.fromkeys(TERMS, 0.1) | {"consist": 0.0})
    one, scaled = (
        critic_loss(s * z, s * y, mask, spec, delta=0.05 * s, width=0.7 * s, denominator=6) for s in (1.0, 1e3)
    )
    for name in TERMS:
        if name != "consist":
            assert float(scaled.raw[name]) == pytest.approx(1e3 * float(one.raw[name]), rel=1e-9), name


@pytest.mark.parametrize("term", ["cvar", "gain", "shape"])
def test_at_the_true_quantiles_single_draws_push_nowhere(term: str) -> None:
    """Also where most draws are equal: a spread that counts all draws at the tail's edge would widen itself."""
    draws = 4_000
    u = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    for returns in (torch.special.ndtri(u), -torch.log1p(-u), (u > 0.3).double()):
        atoms = returns[(LEVELS * draws).long()].expand(1, draws, 1, M)
        mask, weights = torch.ones(1, draws, dtype=torch.bool), dict.fromkeys(TERMS, 0.0) | {term: 1.0}
        z = atoms.clone().requires_grad_()
        loss = critic_loss(z, returns.view(1, -1, 1), mask, robust_spec(weights=weights), delta=0.05, denominator=draws)
        (slope,) = torch.autograd.grad(loss.total, z)
        assert float(slope.sum((0, 1, 2)).abs().max()) < 0.02
        assert abs(float(shift_sum(atoms, returns.view(1, -1, 1), mask, robust_spec()))) < 0.01 * draws
