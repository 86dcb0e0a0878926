from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpo_service.algo.diagnostics import (
    between_groups,
    critic_metrics,
    critic_sums,
    merged_moments,
    policy_metrics,
    policy_sums,
    rollout_kl_metrics,
    rollout_kl_sums,
)
from dvpo_service.algo.quantiles import quantile_levels

LEVELS = quantile_levels(100, "midpoint")


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def test_a_calibrated_critic_is_seen_as_such() -> None:
    n, generator = 20_000, torch.Generator().manual_seed(0)
    centre = torch.randn(1, n, 1, 1, generator=generator)
    z = (centre + torch.distributions.Normal(0.0, 0.5).icdf(LEVELS)).expand(1, n, 2, 100)
    returns = centre[..., 0, 0] + 0.5 * torch.randn(1, n, generator=generator)
    mask = torch.ones(1, n, dtype=torch.bool)
    metrics = critic_metrics(critic_sums(z, returns, mask, LEVELS, 0.1, 0.1))
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert metrics[f"critic/coverage/{level}"] == pytest.approx(level, abs=0.015)
    assert metrics["critic/calibration_error"] < 0.015
    assert metrics["critic/return_mean"] == pytest.approx(float(returns.mean()), rel=1e-4)
    assert metrics["critic/return_sd"] == pytest.approx(1.25**0.5, abs=0.02)
    assert metrics["critic/explained_variance"] == pytest.approx(0.8, abs=0.02)
    assert metrics["critic/head_disagreement"] == 0
    assert metrics["critic/crossing_rate"] == 0
    tail = metrics["critic/quantile_mean"] - metrics["critic/lower_tail_mean"]
    assert tail == pytest.approx(0.5 * 1.755, abs=0.02)
    assert metrics["critic/upper_tail_mean"] > metrics["critic/quantile_mean"]


def test_critic_sums_add_up_and_never_read_padding() -> None:
    z, returns = torch.randn(4, 5, 3, 7), torch.randn(4, 5)
    mask = torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    levels = quantile_levels(7, "endpoint")
    whole = critic_metrics(critic_sums(z, returns, mask, levels, 0.2, 0.3))
    z[~mask], returns[~mask] = math.nan, math.nan
    parts = [critic_sums(z[i : i + 1], returns[i : i + 1], mask[i : i + 1], levels, 0.2, 0.3) for i in range(4)]
    assert critic_metrics(added(parts)) == pytest.approx(whole, rel=1e-6)
    assert 0 < whole["critic/crossing_rate"] < 1
    assert all(x.dtype == torch.float64 for x in parts[0].values())


def test_head_disagreement_by_hand() -> None:
    z = torch.tensor([[[[0.0, 2.0], [3.0, 3.0]]]])
    metrics = critic_metrics(critic_sums(z, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), LEVELS[:2], 1, 1))
    assert metrics["critic/head_disagreement"] == 1.0
    assert math.isnan(metrics["critic/explained_variance"])


def test_the_right_quantiles_of_a_coin_are_calibrated() -> None:
    """Rewards are 0 (30 %) or 1: quantiles near 0 up to level 0.3, near 1 above, a little off as a critic's are."""
    returns = torch.tensor([[0.0] * 3 + [1.0] * 7]).double()
    levels = quantile_levels(20, "midpoint")
    atoms = torch.where(levels < 0.3, -0.01, 0.98).expand(1, 10, 2, 20)
    mask = torch.ones(1, 10, dtype=torch.bool)
    strict = critic_metrics(critic_sums(atoms, returns, mask, levels, 0.1, 0.1))
    lenient = critic_metrics(critic_sums(atoms, returns, mask, levels, 0.1, 0.1, tolerance=0.03))
    assert strict["critic/calibration_error"] > 0.1
    assert lenient["critic/calibration_error"] == 0.0
    assert lenient["critic/coverage/0.1"] == pytest.approx(0.3)


def test_calibration_error_by_hand() -> None:
    """Every return is above all atoms: coverage is 0 at the levels 0.1, 0.25, 0.5, 0.75, 0.9, whose mean is 0.5."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    metrics = critic_metrics(critic_sums(torch.zeros(1, 1, 1, 100), torch.ones(1, 1), mask, LEVELS, 0.1, 0.1))
    assert metrics["critic/calibration_error"] == pytest.approx(0.5)
    assert metrics["critic/coverage/0.9"] == 0
    assert "critic/head_disagreement" not in metrics  # one head agrees with itself


def test_a_scalar_critic_has_a_mean_and_no_quantiles() -> None:
    z, returns = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1), torch.tensor([[1.0, 3.0, 5.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    metrics = critic_metrics(critic_sums(z, returns, mask, quantile_levels(1, "midpoint"), 0.1, 0.1))
    assert metrics == pytest.approx(
        {
            "critic/quantile_mean": 7 / 3,
            "critic/return_mean": 3.0,
            "critic/return_sd": (8 / 3) ** 0.5,
            "critic/explained_variance": 1 - (2 / 9) / (8 / 3),
        }
    )
    assert critic_metrics(critic_sums(z.expand(1, 3, 2, 1), returns, mask, LEVELS[:1], 1, 1)).keys() == metrics.keys()


def test_policy_metrics_by_hand() -> None:
    """The ratios are 2 and 1, and one token is clipped. Values on padding are never read."""
    mask = torch.tensor([[True, True, False]])
    logprobs = torch.tensor([[math.log(0.5), math.log(0.25), math.nan]])
    old = torch.tensor([[math.log(0.25), math.log(0.25), math.nan]])
    clipped = torch.tensor([[True, False, True]])
    metrics = policy_metrics(policy_sums(logprobs, old, clipped, mask))
    assert metrics == pytest.approx(
        {
            "policy/clip_fraction": 0.5,
            "policy/approx_kl": (1 - math.log(2)) / 2,
            "policy/ratio_ess": 9 / (2 * 5),
        }
    )
    entropy = torch.tensor([[1.0, 2.0, math.nan]])
    metrics = policy_metrics(policy_sums(logprobs, old, clipped, mask, ref_logprobs=old, entropy=entropy))
    assert metrics["policy/entropy"] == 1.5
    assert metrics["policy/ref_kl"] == pytest.approx((0.5 - 1 + math.log(2)) / 2)


def test_policy_kl_estimates_the_closed_form() -> None:
    """The expectation of approx_kl over tokens that the old policy samples is exactly KL(old || new)."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    sampled = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])  # in the old policy's proportions
    mask = torch.ones(1, 10, dtype=torch.bool)
    metrics = policy_metrics(policy_sums(new.log()[sampled], old.log()[sampled], mask, mask))
    assert metrics["policy/approx_kl"] == pytest.approx(float((old * (old / new).log()).sum()), rel=1e-5)


def test_policy_sums_add_up() -> None:
    logprobs, old, entropy = -torch.rand(4, 5), -torch.rand(4, 5), torch.rand(4, 5)
    mask, clipped = torch.rand(4, 5) < 0.7, torch.rand(4, 5) < 0.3
    mask[:, 0] = True
    whole = policy_metrics(policy_sums(logprobs, old, clipped, mask, ref_logprobs=old, entropy=entropy))
    rows = [slice(i, i + 1) for i in range(4)]
    parts = [
        policy_sums(logprobs[i], old[i], clipped[i], mask[i], ref_logprobs=old[i], entropy=entropy[i]) for i in rows
    ]
    assert policy_metrics(added(parts)) == pytest.approx(whole)
    assert all(x.dtype == torch.float64 for x in parts[0].values())


def test_rollout_metrics() -> None:
    mask = torch.tensor([[True, True, False]])
    same = torch.tensor([[-1.0, -2.0, math.nan]])
    metrics = rollout_kl_metrics(rollout_kl_sums(same, same, mask))
    assert metrics == {"policy/rollout_kl": 0.0, "policy/rollout_kl_k1": 0.0, "policy/rollout_ess": 1.0}
    trainer = torch.log(torch.tensor([[3.0, 1.0, 1.0]]))
    metrics = rollout_kl_metrics(rollout_kl_sums(trainer, torch.zeros(1, 3), mask))
    assert metrics["policy/rollout_ess"] == pytest.approx(16 / 20)
    assert metrics["policy/rollout_kl_k1"] == pytest.approx(-math.log(3) / 2)
    assert metrics["policy/rollout_kl"] == pytest.approx((2 - math.log(3)) / 2)


def test_no_valid_token_is_nan_not_an_error() -> None:
    none = torch.zeros(1, 2, dtype=torch.bool)
    sums = critic_sums(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2), none, quantile_levels(3, "midpoint"), 0.1, 0.1)
    assert all(math.isnan(x) for x in critic_metrics(sums).values())
    zeros = torch.zeros(1, 2)
    assert all(math.isnan(x) for x in policy_metrics(policy_sums(zeros, zeros, none, none)).values())
    assert all(math.isnan(x) for x in rollout_kl_metrics(rollout_kl_sums(zeros, zeros, none)).values())


def test_the_share_between_prompts_by_the_table_of_shrout_and_fleiss() -> None:
    """Six targets, four judges: ICC(1) is .17 in their paper."""
    table = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert between_groups(torch.tensor(table, dtype=torch.float32)) == pytest.approx(0.1657, abs=1e-4)


def test_the_share_between_prompts_is_that_of_the_law_the_scores_are_drawn_from() -> None:
    torch.manual_seed(0)
    chance = torch.tensor([0.1, 0.9]).repeat(4000)  # variance between: 0.16, of all: 0.25
    assert between_groups(torch.bernoulli(chance[:, None].expand(-1, 8))) == pytest.approx(0.64, abs=0.02)
    assert between_groups(torch.bernoulli(torch.full((8000, 8), 0.3))) == pytest.approx(0.0, abs=0.01)


def test_the_share_between_prompts_leaves_out_groups_with_a_failure_and_is_unknown_without_spread() -> None:
    scores = torch.tensor([[1.0, 1.0], [0.0, 0.0], [math.nan, 0.0]])
    assert between_groups(scores) == 1.0
    for known in (scores[1:], scores[:1], torch.ones(4, 3), torch.rand(5, 1)):
        assert math.isnan(between_groups(known))


@settings(deadline=None)
@given(st.floats(-1e5, 1e5), st.floats(-7, 2), st.integers(0, 2**31), st.booleans())
def test_spreads_of_returns_against_exact_arithmetic(mean: float, log_sd: float, seed: int, equal: bool) -> None:
    """Split over ranks and over steps; equal returns leave exactly 0 (a Huber threshold divides by it)."""
    noise = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    batches = torch.full((3, 4, 5), mean, dtype=torch.float64) + (0 if equal else 10**log_sd) * noise
    mask, levels = torch.ones(4, 5, dtype=torch.bool), quantile_levels(3, "midpoint")
    moments = torch.zeros(3, dtype=torch.float64)
    for returns in batches:
        centre = float(returns[0, 0])
        z = torch.zeros(4, 5, 1, 3, dtype=torch.float64)
        parts = [
            critic_sums(z[i : i + 2], returns[i : i + 2], mask[i : i + 2], levels, 0.1, 0.1, centre=centre)
            for i in (0, 2)
        ]
        metrics = critic_metrics(added(parts), centre)
        sd = _exact_sd(returns)
        assert metrics["critic/return_sd"] == pytest.approx(sd, rel=1e-6, abs=0 if equal else 1e-12)
        assert metrics["critic/return_mean"] == pytest.approx(float(returns.mean()), rel=1e-9, abs=1e-9)
        assert math.isnan(metrics["critic/explained_variance"]) == equal
        moments = merged_moments(moments, added(parts), centre)
    assert moments[0] == batches.numel()
    sd = math.sqrt(float(moments[2]) / batches.numel())
    assert sd == pytest.approx(_exact_sd(batches), rel=1e-5, abs=0 if equal else 1e-12)
    assert torch.equal(
        merged_moments(moments, dict.fromkeys(("count", "return", "return_sq"), torch.zeros(())), 0), moments
    )


def _exact_sd(values: Tensor) -> float:
    exact = [Fraction(v) for v in values.flatten().tolist()]
    centre = sum(exact) / len(exact)
    return math.sqrt(sum((v - centre) ** 2 for v in exact) / len(exact))


@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 6), st.integers(2, 9))
def test_equal_scores_have_no_share_between_prompts(score: float, groups: int, size: int) -> None:
    assert math.isnan(between_groups(torch.full((groups, size), score)))
