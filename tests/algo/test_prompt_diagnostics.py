from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dvpo_service.algo.prompt_diagnostics import clean_correlation, explained_variance_by_prompt


def batch(seed: int = 0, prompts: int = 6, n: int = 8, t: int = 5) -> tuple[Tensor, ...]:
    """Return per-token returns [B, T] (the response's outcome), a mask, the prompts [B] and the outcomes [B]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(prompts).repeat_interleave(n)[torch.randperm(prompts * n, generator=generator)]
    chance = torch.linspace(0.2, 0.8, prompts)[index]
    outcome = (torch.rand(len(index), generator=generator) < chance).double()
    mask = torch.arange(t) < torch.randint(1, t + 1, (len(index), 1), generator=generator)
    return torch.where(mask, outcome[:, None], math.nan), mask, index, outcome


def test_values_of_the_prompt_alone_explain_all_between_and_nothing_within() -> None:
    returns, mask, index, _ = batch()
    means = torch.stack([returns[index == p][mask[index == p]].mean() for p in range(6)])
    values = means[index][:, None].expand(mask.shape)
    between, within = explained_variance_by_prompt(values, returns, mask, index)
    assert between == pytest.approx(1.0)
    assert within == pytest.approx(0.0, abs=1e-12)


def test_values_that_know_right_from_wrong_but_not_the_prompt() -> None:
    returns, mask, index, _ = batch()
    means = torch.stack([returns[index == p][mask[index == p]].mean() for p in range(6)])
    between, within = explained_variance_by_prompt(returns - means[index][:, None], returns, mask, index)
    assert within == pytest.approx(1.0)
    assert between == pytest.approx(0.0, abs=1e-12)


def test_the_two_are_the_parts_of_the_whole() -> None:
    returns, mask, index, _ = batch(1)
    values = torch.rand(mask.shape, dtype=torch.float64) + 0.3 * index[:, None]
    between, within = explained_variance_by_prompt(values, returns, mask, index)
    truth, error = returns[mask], (returns - values)[mask]
    means = {p: returns[index == p][mask[index == p]].mean() for p in range(6)}
    tokens = index[:, None].expand(mask.shape)[mask].tolist()
    share = sum((means[p] - truth.mean()) ** 2 for p in tokens) / (truth.var(correction=0) * len(truth))
    whole = 1 - error.var(correction=0) / truth.var(correction=0)
    assert float(share * between + (1 - share) * within) == pytest.approx(float(whole))


def test_without_spread_it_is_unknown() -> None:
    returns, mask, index, _ = batch(2)
    between, within = explained_variance_by_prompt(returns, torch.ones_like(returns), mask, index)
    assert math.isnan(between)
    assert math.isnan(within)
    assert math.isnan(explained_variance_by_prompt(returns, returns, mask, torch.arange(len(index)))[1])  # n = 1
    nothing = explained_variance_by_prompt(returns, returns, torch.zeros_like(mask), index)
    assert all(math.isnan(x) for x in nothing)


def test_the_correlation_with_the_clean_outcome_is_that_within_prompts() -> None:
    _, mask, index, outcome = batch(3)
    noise = torch.randn(len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = 50.0 * index.double()  # what the prompts differ in does not count
    advantages = torch.where(mask, (2 * outcome + noise + offset)[:, None], math.nan)
    groups = [(index == p).nonzero().flatten() for p in range(6)]
    a, o = (torch.cat([x[rows] - x[rows].mean() for rows in groups]) for x in (2 * outcome + noise, outcome))
    expected = float(torch.corrcoef(torch.stack((a, o)))[0, 1])
    assert clean_correlation(advantages, outcome, mask, index) == pytest.approx(expected)
    assert clean_correlation(3 * advantages - 7, outcome, mask, index) == pytest.approx(expected)
    assert clean_correlation(outcome[:, None].expand(mask.shape), outcome, mask, index) == pytest.approx(1.0)


def test_failed_samples_do_not_count_and_no_spread_is_unknown() -> None:
    _, mask, index, outcome = batch(4)
    advantages = outcome[:, None].expand(mask.shape).clone()
    mask[0], outcome[0], advantages[0] = False, math.nan, math.nan
    assert clean_correlation(advantages, outcome, mask, index) == pytest.approx(1.0)
    for constant in (torch.ones_like(outcome), index.double()):
        assert math.isnan(clean_correlation(advantages, constant, mask, index))
    assert math.isnan(clean_correlation(advantages, outcome, torch.zeros_like(mask), index))
