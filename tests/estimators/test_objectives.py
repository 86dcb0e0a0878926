"""Objectives and estimators, built from a config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import scalar_gae
from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.estimators.base import Estimate, RunningStats, critic_objective
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.types import Rollouts
from tests.builders import make_rollouts

STATS = RunningStats(return_sd=0.5, return_width=0.4, worst_value=-1.0)


def estimate(*, pretraining: bool = False, seed: int = 0, **algorithm: Any) -> tuple[Estimate, Tensor, Rollouts]:
    config = AlgorithmConfig.model_validate({"n_quantiles": 12, "n_heads": 3} | algorithm)
    objective, part = critic_objective(config, CriticConfig()), make_rollouts(seed=seed)
    b, t = part.rewards.shape
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(b, t, objective.heads, objective.quantiles, generator=rng)
    z_end = torch.randn(b, objective.heads, objective.quantiles, generator=rng)
    seeds = torch.arange(b)
    result = objective.estimate(z, z_end, part, seeds=seeds, pretraining=pretraining, stats=STATS)
    return result, z, part


@pytest.mark.parametrize("form", ["paper", "calibrated"])
@pytest.mark.parametrize(
    "neutral",
    [
        {"advantage": "cvar", "advantage_alpha": 1.0},
        {"advantage": "entropic", "advantage_beta": 0.0},
        {"head_trust": 0.0},
    ],
    ids=["cvar", "entropic", "head_trust"],
)
def test_risk_is_the_mean_at_its_neutral_value(form: str, neutral: dict[str, Any]) -> None:
    mean, _, _ = estimate(form=form)
    assert torch.equal(estimate(form=form, **neutral)[0].advantages, mean.advantages)


@pytest.mark.parametrize(
    "risky",
    [
        {"advantage": "cvar", "advantage_alpha": 0.2},
        {"advantage": "entropic", "advantage_beta": -2.0},
        {"head_trust": 1.0},
        {"advantage": "huber"},
    ],
    ids=["cvar", "entropic", "head_trust", "huber"],
)
def test_risk_changes_the_advantage_elsewhere(risky: dict[str, Any]) -> None:
    mean, _, part = estimate(form="calibrated")
    risk, _, _ = estimate(form="calibrated", **risky)
    assert not torch.allclose(risk.advantages, mean.advantages)
    assert torch.isfinite(risk.advantages).all()
    assert (risk.advantages[~part.response_mask] == 0).all()


@pytest.mark.parametrize(
    "targets", [{"form": "paper", "lam": 0.9}, {"form": "calibrated", "lam": 1.0}, {"form": "calibrated", "lam": 0.0}]
)
def test_huber_with_a_wide_clip_is_the_mean(targets: dict[str, Any]) -> None:
    mean, _, _ = estimate(**targets)
    wide, _, _ = estimate(**targets, advantage="huber", advantage_clip=1e3, advantage_clip_scale="absolute")
    assert_close(wide.advantages, mean.advantages, atol=1e-6, rtol=1e-6)


def test_huber_over_mixture_targets_is_the_mean_averaged_over_their_choices() -> None:
    wide = {"advantage": "huber", "advantage_clip": 1e3}
    mean, _, part = estimate(form="calibrated", lam=0.8, n_quantiles=400)
    some, _, _ = estimate(form="calibrated", lam=0.8, n_quantiles=400, **wide)
    assert not torch.equal(some.advantages, mean.advantages)
    assert_close(some.advantages, mean.advantages, atol=0.15, rtol=0)
    assert float((some.advantages - mean.advantages)[part.response_mask].mean()) == pytest.approx(0, abs=0.03)


def test_huber_is_bounded_by_its_clip_in_units_of_the_returns_width() -> None:
    for scale, unit in (("absolute", 1.0), ("return_width", STATS.return_width)):
        made, _, _ = estimate(form="calibrated", advantage="huber", advantage_clip=0.5, advantage_clip_scale=scale)
        largest = float(made.advantages.abs().max())
        assert 0.5 * 0.5 * unit < largest <= 0.5 * unit


def test_huber_takes_the_policys_lambda_where_the_critic_has_another() -> None:
    huber = {"form": "calibrated", "advantage": "huber"}
    split, _, _ = estimate(lam=0.5, critic_lam=1.0, **huber)
    same, _, _ = estimate(lam=0.5, **huber)
    assert torch.equal(split.advantages, same.advantages)
    adaptive, _, part = estimate(length_adaptive_alpha=0.5, **huber)
    row = int(part.response_mask.sum(1).argmax())
    fixed, _, _ = estimate(lam=1 - 1 / (0.5 * int(part.response_mask[row].sum())), **huber)
    assert_close(adaptive.advantages[row], fixed.advantages[row])


def test_the_huber_delta_is_in_the_unit_that_the_config_names() -> None:
    for scale, unit in (("absolute", 1.0), ("return_sd", STATS.return_sd), ("return_width", STATS.return_width)):
        config = AlgorithmConfig.model_validate({"huber_delta": 0.3, "huber_scale": scale, "n_quantiles": 4})
        objective, part = critic_objective(config, CriticConfig()), make_rollouts()
        z = torch.randn(*part.rewards.shape, objective.heads, objective.quantiles)
        made = objective.estimate(z, z[:, 0], part, seeds=torch.arange(len(z)), pretraining=False, stats=STATS)
        _, parts = objective.loss(
            z, made, part.response_mask, denominator=part.num_tokens, stats=STATS, batch_mean_shift=0.0
        )
        assert float(parts["huber_delta"]) == pytest.approx(0.3 * unit)


def test_the_advantage_is_scalar_gae_on_the_mean_atom() -> None:
    dvpo, z, part = estimate(form="paper", lam=0.9)
    value = z.sort(-1).values.mean((-1, -2))
    expected, _ = scalar_gae(part.rewards, value, part.response_mask, torch.zeros(len(part)), 1.0, 0.9)
    assert_close(dvpo.advantages, expected)
    assert_close(dvpo.targets.mean(-1) - dvpo.values, expected, atol=1e-5, rtol=1e-5)


def test_a_cut_response_is_bootstrapped_where_that_is_asked_for_and_a_finished_one_is_not() -> None:
    (cut,) = (~make_rollouts().finished).nonzero().flatten().tolist()
    booted, _, part = estimate(lam=1.0, bootstrap_truncated=True)
    plain, _, _ = estimate(lam=1.0)
    rows = torch.arange(len(part)) != cut
    assert torch.equal(booted.targets[rows], plain.targets[rows])
    assert not torch.equal(booted.targets[cut], plain.targets[cut])


@pytest.mark.parametrize("estimator", ["dvpo", "gae", "robust_gae"])
def test_pretraining_aims_at_plain_returns(estimator: str) -> None:
    rho = {"robust_rho": 0.0} if estimator == "robust_gae" else {}
    pretrained, _, part = estimate(pretraining=True, lam=0.5, adv_estimator=estimator, **rho)
    returns = torch.where(part.response_mask, part.scores.nan_to_num()[:, None], 0.0)
    assert_close(pretrained.targets, returns[..., None].expand_as(pretrained.targets))


def test_decoupled_lambdas() -> None:
    both, _, _ = estimate(lam=0.5, form="paper")
    split, _, _ = estimate(lam=0.5, critic_lam=1.0, form="paper")
    ones, _, _ = estimate(lam=1.0, form="paper")
    assert torch.equal(split.advantages, both.advantages)
    assert torch.equal(split.targets, ones.targets)


def test_a_long_answer_has_a_longer_trace() -> None:
    adaptive, _, part = estimate(length_adaptive_alpha=0.5, form="paper")
    row = int(part.response_mask.sum(1).argmax())
    length = int(part.response_mask[row].sum())
    fixed, _, _ = estimate(lam=1 - 1 / (0.5 * length), form="paper")
    assert_close(adaptive.advantages[row], fixed.advantages[row])


def test_robust_gae_is_gae_without_contamination_and_lower_with() -> None:
    plain, _, part = estimate(adv_estimator="gae")
    none, _, _ = estimate(adv_estimator="robust_gae", robust_rho=0.0)
    some, _, _ = estimate(adv_estimator="robust_gae", robust_rho=0.1)
    assert torch.equal(plain.targets, none.targets)
    first = part.response_mask & (part.response_mask.sum(1, keepdim=True) > 1)
    assert (some.targets[first].mean() < plain.targets[first].mean()).item()


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"])
def test_group_estimators_need_no_critic_and_leave_failed_samples_out(estimator: str) -> None:
    config = AlgorithmConfig.model_validate({"adv_estimator": estimator})
    assert not config.has_critic
    part = make_rollouts()
    result, metrics = GroupEstimator(config).advantages(part, 0)
    assert torch.isfinite(result.advantages).all()
    assert (result.advantages[~part.response_mask] == 0).all()
    assert (result.advantages[0] == 0).all(), "its scoring failed"
    assert metrics["advantage/std"] > 0
    if estimator != "reinforce_plus_plus":  # the first group has one failed sample; outcomes balance without it
        outcomes = part.scores[1:4]
        signs = result.advantages[1:4, 0].sign()
        assert torch.equal(signs, (outcomes - outcomes.mean()).sign())
