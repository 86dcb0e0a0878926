"""Claims about the critic's terms, tested by training: atoms are fitted to a known distribution by a loss.

A batch consists of tokens with one draw each. The draws are quantiles of the distribution, and all tokens share the
same atoms. So the batch represents the distribution, and the loss is its expectation: there is no noise, and every
number here is reproducible. Standard deviations are relative to the standard deviation of the distribution's own M
quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from algo_reference import calibrated_spec, paper_spec
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import distributional_gae, mixture_targets, scalar_gae
from dvpo_service.algo.critic_loss import critic_loss
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec

M, DRAWS, DELTA = 40, 400, 0.05


def only(**weights: float) -> dict[str, float]:
    """Return the given weights, and 0 for all other terms."""
    return dict.fromkeys(TERMS, 0.0) | weights


def normal(draws: int = DRAWS) -> Tensor:
    return torch.special.ndtri(midpoints(draws))


def skewed(draws: int = DRAWS) -> Tensor:
    """Return quantiles of the exponential distribution."""
    return -torch.log1p(-midpoints(draws))


def coin(draws: int = DRAWS) -> Tensor:
    return (midpoints(draws) > 0.5).double()


def midpoints(m: int) -> Tensor:
    return (torch.arange(m, dtype=torch.float64) + 0.5) / m


def quantiles(draws: Tensor, m: int = M) -> Tensor:
    return draws.quantile(midpoints(m))


def spread(atoms: Tensor, draws: Tensor) -> float:
    """Return the sd of the ensemble's atoms divided by the sd of as many quantiles of the draws."""
    q = atoms.mean(0)
    return float(q.std(correction=0) / quantiles(draws, q.numel()).std(correction=0))


def mean(atoms: Tensor) -> float:
    return float(atoms.mean())


def loss_of(z: Tensor, draws: Tensor, spec: CriticLossSpec, delta: float = DELTA) -> Tensor:
    """Return the mean loss of the shared atoms z [H, M] over tokens that have one draw each."""
    n = draws.numel()
    mask = torch.ones(1, n, dtype=torch.bool)
    return critic_loss(z.expand(1, n, *z.shape), draws[None, :, None], mask, spec, delta=delta, denominator=n).total


def learn(
    draws: Tensor | Callable[[], Tensor],
    spec: CriticLossSpec,
    *,
    delta: float = DELTA,
    start: Tensor | None = None,
    m: int = M,
    steps: int = 400,
) -> Tensor:
    """Return the atoms [H, M], sorted, that minimise the loss: the mean over the last quarter of Adam's steps.

    ``draws`` is a batch for all steps, or a function that returns a new batch for each step.
    """
    z = torch.linspace(-1, 1, m, dtype=torch.float64)[None] if start is None else start.clone()
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    last = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(z, draws() if callable(draws) else draws, spec, delta).backward()
        optimizer.step()
        decay.step()
        if 4 * step >= 3 * steps:
            last.append(z.detach().sort(-1).values)
    return torch.stack(last).mean(0)


@pytest.mark.parametrize("draws", [normal(), skewed()], ids=["normal", "skewed"])
@pytest.mark.parametrize("term", ["qr", "risk"])
def test_eq_3_and_eq_4_alone_are_proper(term: str, draws: Tensor) -> None:
    atoms = learn(draws, calibrated_spec(weights=only(**{term: 1.0})))
    assert spread(atoms, draws) == pytest.approx(1, abs=0.01)
    assert mean(atoms) == pytest.approx(mean(quantiles(draws)), abs=0.01)
    assert_close(atoms[0, 2:-2], quantiles(draws)[2:-2], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("make_spec", "delta", "weight", "kept"),
    [
        (calibrated_spec, DELTA, 0.1, 0.306),
        (calibrated_spec, DELTA, 1.0, 0.052),
        (paper_spec, 1.0, 0.1, 0.213),  # a delta of 1 narrows it further
        (paper_spec, 1.0, 1.0, 0.034),
    ],
)
def test_tail_means_of_single_draws_collapse_the_distribution(
    make_spec: Callable[..., CriticLossSpec], delta: float, weight: float, kept: float
) -> None:
    spec = make_spec(tail_target="tail_mean", weights=only(qr=1.0, cvar=weight, gain=weight))
    assert spread(learn(normal(), spec, delta=delta), normal()) == pytest.approx(kept, abs=0.02)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_pseudo_outcomes_do_not_collapse_it(weight: float) -> None:
    atoms = learn(normal(), calibrated_spec(weights=only(qr=1.0, cvar=weight, gain=weight)))
    assert spread(atoms, normal()) == pytest.approx(1, abs=0.025)
    assert mean(atoms) == pytest.approx(0, abs=0.005)


def test_eq_7_per_token_drives_the_mean_up_until_few_targets_exceed_it() -> None:
    """The top atom stops where the pull down on it, (1 - tau_M)/M, equals w P(y > mean)/M.

    The mean is then at 0.67 here, and would be at 1.96 for M = 200.
    """
    m, weight = 20, 0.1
    spec = calibrated_spec(shift_over="token", weights=only(qr=1.0, shift=weight))
    atoms = learn(normal(), spec, m=m, steps=800)
    rest = NormalDist().inv_cdf(1 - 1 / (2 * m * weight))
    assert mean(atoms) == pytest.approx(rest, abs=0.02)
    assert spread(atoms, normal()) > 2.5  # the top atoms ran away from the data to hold the mean there
    assert atoms.max() > 3 * normal().max()


def test_eq_7_per_token_with_endpoint_levels_has_no_rest_below_the_largest_target() -> None:
    z = normal(M)[None].clone()
    z[0, -1] += 2.9 * M  # the mean is now above all draws but one
    z.requires_grad_()
    loss_of(z, normal(), paper_spec(weights=only(qr=1.0, shift=0.1)), 1.0).backward()
    assert z.mean() > normal()[-2]
    assert z.grad is not None
    assert z.grad[0, -1] < 0


def test_eq_7_over_the_batch_leaves_the_law_alone() -> None:
    atoms = learn(normal(), calibrated_spec(weights=only(qr=1.0, risk=1.0, shift=0.1)))
    assert spread(atoms, normal()) == pytest.approx(1, abs=0.01)
    assert mean(atoms) == pytest.approx(0, abs=0.02)


def test_eq_7_over_a_small_batch_keeps_a_bias_that_falls_with_the_batch() -> None:
    """By chance the shift of a right critic is positive in half of the batches. A draw is one independent return."""
    spec = calibrated_spec(weights=only(qr=1.0, risk=1.0, shift=0.1))

    def bias(batch: int) -> float:
        generator = torch.Generator().manual_seed(0)
        fresh = lambda: torch.randn(batch, generator=generator, dtype=torch.float64)  # noqa: E731
        return mean(learn(fresh, spec, steps=600))

    small, large = bias(32), bias(512)
    assert 0.08 < small < 0.25
    assert large < small / 2


def test_eq_8_contracts_the_lower_tail_of_single_draws_and_leaves_the_upper_one() -> None:
    """One draw has no variance, so the tail's variance has the target 0: Eq. 8 is a prior, in both forms."""
    atoms = learn(normal(), calibrated_spec(weights=only(qr=1.0, risk=1.0, shape=0.1)))[0]
    true = quantiles(normal())
    assert float(atoms[0] - true[0]) == pytest.approx(0.54, abs=0.1)
    assert_close(atoms[5:-2], true[5:-2], atol=0.05, rtol=0)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_calibrated_form_keeps_the_law_at_its_default_weights(heads: int) -> None:
    start = torch.randn(heads, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    atoms = learn(normal(), calibrated_spec(), start=start)
    assert spread(atoms, normal()) == pytest.approx(1, abs=0.03)
    assert mean(atoms) == pytest.approx(0, abs=0.01)
    assert_close(atoms[:, 4:-4], quantiles(normal())[4:-4].expand(heads, -1), atol=0.06, rtol=0)
    assert (atoms - atoms.mean(0)).abs().max() < 0.05  # the heads agree


def test_the_paper_form_at_its_default_weights_is_nearly_a_constant() -> None:
    assert spread(learn(normal(), paper_spec(), delta=1.0), normal()) == pytest.approx(0.07, abs=0.04)


def test_a_delta_of_1_learns_expectiles_of_0_1_rewards() -> None:
    """Within delta the loss is quadratic, and the tau-expectile of a fair coin is tau itself."""
    spec = calibrated_spec(huber_unit=False, weights=only(qr=1.0))
    atoms = learn(coin(), spec, delta=1.0)
    assert_close(atoms[0], midpoints(M), atol=0.01, rtol=0)
    assert spread(atoms, coin()) == pytest.approx(0.577, abs=0.005)


def test_the_calibrated_delta_learns_quantiles_of_0_1_rewards() -> None:
    atoms = learn(coin(), calibrated_spec(weights=only(qr=1.0)), delta=DELTA * 0.5)  # 0.5: the coin's sd
    assert_close(atoms[0], quantiles(coin()), atol=DELTA * 0.5, rtol=0)
    assert spread(atoms, coin()) > 0.97


@pytest.mark.parametrize("term", ["qr", "risk"])
def test_the_top_atom_of_endpoint_levels_only_rises(term: str) -> None:
    above = normal(M)[None] + 6  # every atom above every draw, as after a run of luck
    endpoint = learn(normal(), calibrated_spec(quantile_levels="endpoint", weights=only(**{term: 1.0})), start=above)
    midpoint = learn(normal(), calibrated_spec(weights=only(**{term: 1.0})), start=above)
    assert_close(endpoint[0, -1], above[0, -1], rtol=1e-12, atol=0)  # its gradient is 0, not small
    assert endpoint[0, :-1].max() < 3
    assert float(midpoint[0, -1]) == pytest.approx(float(quantiles(normal())[-1]), abs=0.2)


def test_regression_on_the_ensemble_mean_keeps_the_heads_apart_for_ever() -> None:
    start = torch.linspace(-1, 1, M, dtype=torch.float64) + torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    together = learn(normal(), calibrated_spec(qr_over="ensemble", weights=only(qr=1.0)), start=start)
    assert_close(together[2] - together[0], torch.full((M,), 2.0, dtype=torch.float64))
    assert spread(together, normal()) == pytest.approx(1, abs=0.01)  # their mean has learned the distribution
    apart = learn(normal(), calibrated_spec(qr_over="heads", weights=only(qr=1.0)), start=start)
    assert_close(apart[2], apart[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("make_spec", [paper_spec, calibrated_spec])
def test_eq_9_and_eq_10_are_priors(make_spec: Callable[..., CriticLossSpec]) -> None:
    """They can be 0 for a wrong distribution, and their gradient does not depend on the data."""
    spec = make_spec(weights=only(curv=1.0, consist=1.0))
    wrong = torch.linspace(50, 60, M, dtype=torch.float64).repeat(2, 1)
    assert float(loss_of(wrong, normal(), spec)) == pytest.approx(0, abs=1e-12)
    z = torch.randn(2, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (here,) = torch.autograd.grad(loss_of(z, normal(), spec), z)
    (there,) = torch.autograd.grad(loss_of(z, 3 * normal() + 100, spec), z)
    assert here.abs().max() > 0
    assert_close(here, there, rtol=1e-12, atol=1e-15)


def fitted_chain(kind: str, tokens: int, lam: float, draws: int = 128, m: int = 32) -> Tensor:
    """Return the relative sd, at each token, of the atoms that equal the quantiles of their own targets, [tokens].

    The chain has no choices and a single reward, N(0, 1), at its end, so the return has that distribution at every
    token. The targets of token t need only later values, so one sweep from the end finds the fixed point.
    """
    generator = torch.Generator().manual_seed(0)
    atoms = torch.zeros(1, tokens, m, dtype=torch.float64)
    for t in reversed(range(tokens)):
        rewards = torch.zeros(draws, tokens - t, dtype=torch.float64)
        rewards[:, -1] = normal(draws)[torch.randperm(draws, generator=generator)]
        mask, end = torch.ones_like(rewards, dtype=torch.bool), torch.zeros(draws, m, dtype=torch.float64)
        values = atoms[:, t:].expand(draws, -1, -1)
        if kind == "gae":
            targets = distributional_gae(rewards, values, mask, end, 1.0, lam)
        else:
            seeds = torch.randint(2**60, (draws,), generator=generator)
            targets = mixture_targets(rewards, values, mask, end, 1.0, lam, seeds)
        atoms[0, t] = quantiles(targets[:, 0].flatten(), m)
    return atoms[0].std(-1, correction=0) / quantiles(normal(draws), m).std(correction=0)


def test_eq_2_targets_halve_the_sd_far_from_the_end() -> None:
    """For small 1 - lambda the sd n tokens from the end is (1 + lambda^2n)/2."""
    tokens, lam = 60, 0.95
    sd = fitted_chain("gae", tokens, lam)
    distance = torch.arange(tokens - 1, -1, -1, dtype=torch.float64)
    assert_close(sd, (1 + lam ** (2 * distance)) / 2, atol=0.03, rtol=0)
    assert float(sd[0]) == pytest.approx(0.51, abs=0.01)
    assert_close(fitted_chain("gae", 8, 1.0), torch.ones(8, dtype=torch.float64), atol=0.01, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_mixture_targets_keep_the_law_at_every_token(lam: float) -> None:
    assert_close(fitted_chain("mixture", 60, lam), torch.ones(60, dtype=torch.float64), atol=0.03, rtol=0)


def test_the_advantage_of_any_fixed_weighting_of_atoms_is_gae_with_another_baseline() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(4, 9, generator=generator), torch.randn(4, 9, M, generator=generator)
    rewards, values = rewards.double(), values.double().sort(-1).values
    mask, end = torch.rand(4, 9, generator=generator) < 0.8, torch.zeros(4, M, dtype=torch.float64)
    weights = torch.rand(M, generator=generator).double()
    for lam in (0.0, 0.9, 1.0):
        advantages = distributional_gae(rewards, values, mask, end, 0.99, lam) - values.where(mask[..., None], 0.0)
        for w in (torch.full_like(weights, 1 / M), weights / weights.sum()):
            baseline = values @ w
            expected, _ = scalar_gae(rewards, baseline, mask, end[:, 0], 0.99, lam)
            assert_close(advantages @ w, expected, rtol=1e-12, atol=1e-13)
    # lambda = 1: the same returns, so the advantages differ by the baselines, token by token.
    mean, _ = scalar_gae(rewards, values.mean(-1), mask, end[:, 0], 0.99, 1.0)
    assert_close((expected - mean)[mask], (values.mean(-1) - baseline)[mask], rtol=1e-12, atol=1e-13)
    assert not math.isclose(float(expected.abs().sum()), float(mean.abs().sum()))
