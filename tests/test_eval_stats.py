"""Statistics of an evaluation against independent references."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_service.eval_stats import PromptScores, accuracy_interval, by_group, ks, mean_interval, pass_at_k, summarize

outcomes = st.lists(st.booleans(), min_size=1, max_size=8)


@settings(deadline=None)
@given(outcomes, st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_the_product_form_of_the_paper(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    product = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 30), st.data())
def test_pass_at_k_rises_with_k_from_the_share_that_is_right(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(c / n)
    assert values[-1] == (1.0 if c else 0.0)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over draws is 1 - (1-p)^k. The mean of the plug-in estimate 1 - (1 - c/n)^k is not."""
    p, n, k = 0.2, 8, 4
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert mean == pytest.approx(1 - (1 - p) ** k)
    assert abs(plug_in - mean) > 0.02


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_more_than_there_is(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, right, k)


def test_ks() -> None:
    assert [ks(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


scores = st.lists(st.floats(0, 1), min_size=4, max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(scores, st.sampled_from([0.0, 1.0])), min_size=2, max_size=20))
def test_a_group_of_prompts(drawn: list[tuple[list[float], float]]) -> None:
    summary = summarize([PromptScores("val", "a", tuple(s), g) for s, g in drawn], 4)
    table = np.array([s for s, _ in drawn])
    means, greedy = table.mean(1), np.array([g for _, g in drawn])
    assert summary["accuracy"] == pytest.approx(means.mean())
    assert summary["standard_error"] == pytest.approx(scipy.stats.sem(means), abs=1e-12)
    interval = scipy.stats.t.interval(0.95, len(means) - 1, means.mean(), scipy.stats.sem(means) or 1e-300)
    if set(table.ravel()) <= {0.0, 1.0}:
        assert summary["ci95_method"] == "wilson"
    else:
        assert summary["ci95_method"] == "student_t"
        assert summary["ci95"] == pytest.approx(np.clip(interval, 0, 1), abs=1e-9)
    assert summary["sd_within_prompt"] == pytest.approx(math.sqrt(table.var(1, ddof=1).mean()), abs=1e-12)
    assert summary["greedy"] == pytest.approx(greedy.mean())
    assert summary["greedy_standard_error"] == pytest.approx(scipy.stats.sem(greedy), abs=1e-12)
    right = (table >= 0.5).sum(1)
    assert summary["pass_at_k"]["1"] == pytest.approx((right / 4).mean())
    assert summary["pass_at_k"]["4"] == pytest.approx((right > 0).mean())


def test_samples_that_failed_are_counted_and_left_out() -> None:
    prompts = [PromptScores("val", "a", (1.0,), None, failed=1), PromptScores("val", "a", (0.0, 1.0), 1.0)]
    summary = summarize(prompts, 2)
    assert (summary["prompts"], summary["samples"], summary["failed"]) == (2, 3, 1)
    assert summary["accuracy"] == pytest.approx(0.75)
    assert summary["greedy"] == 1.0
    assert summary["pass_at_k"] == {"1": pytest.approx(0.75), "2": 1.0}, "only the second prompt has two samples"


def test_what_is_not_defined_is_null() -> None:
    summary = summarize([PromptScores("val", "a", (), None, failed=2)], 2)
    names = ("accuracy", "standard_error", "ci95", "ci95_method", "sd_within_prompt", "greedy", "greedy_standard_error")
    assert all(summary[name] is None for name in names)
    assert summary["pass_at_k"] == {"1": None, "2": None}
    assert "NaN" not in json.dumps(summary)


def test_groups_by_split_and_by_source() -> None:
    prompts = [
        PromptScores("id", "gsm8k", (1.0, 1.0), 1.0),
        PromptScores("id", "maths", (0.0, 0.0), 0.0),
        PromptScores("ood", "maths", (1.0, 0.0), 0.0),
    ]
    grouped = by_group(prompts, 2)
    assert {name: g["accuracy"] for name, g in grouped["splits"].items()} == {"id": 0.5, "ood": 0.5}
    assert {name: g["accuracy"] for name, g in grouped["sources"].items()} == {"gsm8k": 1.0, "maths": 0.25}
    assert grouped["sources"]["maths"]["prompts"] == 2


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_interval_of_a_mean_covers_what_it_says(n: int) -> None:
    """A percentile bootstrap covers 75, 84 and 89 % there."""
    drawn = np.random.default_rng(n).standard_normal((1500, n))
    found = np.array([mean_interval(row) for row in drawn.tolist()])
    share = ((found[:, 0] < 0) & (found[:, 1] > 0)).mean()
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1500))
    assert np.allclose(found[0], scipy.stats.ttest_1samp(drawn[0], 0).confidence_interval(0.95))


@pytest.mark.parametrize(("right", "of"), [(0, 10), (1, 10), (29, 30), (30, 30), (57, 60)])
def test_one_sample_of_0_or_1_a_prompt_gets_wilson_s_interval(right: int, of: int) -> None:
    found, method = accuracy_interval([[1.0]] * right + [[0.0]] * (of - right))
    assert method == "wilson"
    assert found == pytest.approx(scipy.stats.binomtest(right, of).proportion_ci(method="wilson"), abs=1e-12)


@pytest.mark.parametrize("alike", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("p", [0.5, 0.95])
def test_wilson_s_interval_covers_also_where_a_prompt_s_samples_are_alike(p: float, alike: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        own = (rng.random((40, 4)) < p).astype(float)
        shared = np.where(rng.random((40, 1)) < alike, own[:, :1], own)
        (low, high), method = accuracy_interval(shared.tolist())
        assert method == "wilson"
        assert 0 <= low <= shared.mean() <= high <= 1
        covered += low <= p <= high
    assert 0.84 <= covered / 400 <= 0.995


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=3), min_size=1))
def test_the_interval_of_an_accuracy_stays_between_0_and_1(samples: list[list[float]]) -> None:
    found, method = accuracy_interval(samples)
    if found is None:
        assert method is None
        return
    mean = np.mean([np.mean(s) for s in samples])
    assert 0 <= found[0] <= mean + 1e-12
    assert mean - 1e-12 <= found[1] <= 1


def test_rewards_beyond_0_and_1_are_not_cut() -> None:
    found, method = accuracy_interval([[-1.0], [1.0], [1.0]])
    assert method == "student_t"
    assert found is not None
    assert found[0] < -1
    assert found[1] > 1
