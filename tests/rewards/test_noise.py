import math
import statistics

import pytest

from dvpo_service.errors import ConfigError
from dvpo_service.rewards.noise import NoiseSpec, score_group
from dvpo_service.rewards.scoring import resolve
from dvpo_service.rewards.seeds import sample_seed

EXACT = resolve("exact_match")
SEEDS = [sample_seed(0, 0, 0, i) for i in range(4000)]


def group(responses, answer="1", score=EXACT, seeds=SEEDS, **noise):
    return score_group(responses, answer, score=score, noise=NoiseSpec(**noise), seeds=seeds[: len(responses)])


def test_sample_seed_is_stable_and_distinct():
    assert sample_seed(0, 1, 2, 3) == 5628492896039661565  # fixed: runs must stay repeatable
    seeds = {sample_seed(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)}
    assert len(seeds) == 256
    assert sample_seed(1, 11, 1, 1) != sample_seed(1, 1, 11, 1) != sample_seed(11, 1, 1, 1)
    assert all(0 <= s < 2**63 for s in seeds)


def test_no_noise():
    assert [(s.reward, s.clean, s.error) for s in group(["1", "2"])] == [(1.0, 1.0, None), (0.0, 0.0, None)]


def test_flip():
    scores = group(["1"] * 4000, kind="flip", p=0.2)
    assert {s.reward for s in scores} == {0.0, 1.0}
    assert all(s.clean == 1.0 for s in scores)
    assert statistics.mean(s.reward for s in scores) == pytest.approx(0.8, abs=0.02)
    assert scores == group(["1"] * 4000, kind="flip", p=0.2)
    assert scores[7:9] == group(
        ["1"] * 2, seeds=SEEDS[7:9], kind="flip", p=0.2
    )  # depends on the seed, not on the position
    assert all(s.reward == 0 for s in group(["1"] * 50, kind="flip", p=1.0))
    assert all(s.reward == 1 for s in group(["1"] * 50, kind="flip", p=0.0))


def test_flip_refuses_what_is_no_outcome():
    (score,) = group(["1"], score=lambda response, answer: 2.5, kind="flip", p=0.5)
    assert math.isnan(score.reward)
    assert score.error == "flip noise needs an outcome from 0 to 1, got 2.5"


def test_gaussian():
    scores = group(["1"] * 4000, kind="gaussian", sd=0.5)
    assert statistics.mean(s.reward for s in scores) == pytest.approx(1.0, abs=0.03)
    assert statistics.stdev(s.reward for s in scores) == pytest.approx(0.5, abs=0.03)
    assert {s.clean for s in scores} == {1.0}


def test_majority_vote():
    scores = group(["2", "1", " 2 ", ""], answer="1", kind="majority_vote")
    assert [(s.reward, s.clean) for s in scores] == [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
    numbers = group(["so 1,000", "#### 1000", "3"], answer="3", score=resolve("gsm8k"), kind="majority_vote")
    assert [s.reward for s in numbers] == [1.0, 1.0, 0.0]
    assert [s.reward for s in group(["", " "], kind="majority_vote")] == [0.0, 0.0]
    assert group([], kind="majority_vote") == []


def test_majority_vote_ties_depend_on_the_seed():
    winners = [tuple(s.reward for s in group(["2", "3"], seeds=[seed, 0], kind="majority_vote")) for seed in range(50)]
    assert set(winners) == {(1.0, 0.0), (0.0, 1.0)}
    assert winners[3] == tuple(s.reward for s in group(["2", "3"], seeds=[3, 0], kind="majority_vote"))


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", 1j, [1.0]])
@pytest.mark.parametrize("kind", ["none", "flip", "gaussian", "majority_vote"])
def test_what_is_no_finite_number_is_an_error_never_zero(value, kind):
    (score,) = group(["1"], score=lambda response, answer: value, kind=kind)
    assert math.isnan(score.reward)
    assert math.isnan(score.clean)
    assert score.error == f"the scoring function returned {value!r}, not a finite number"


def test_bool_counts_as_number():
    assert [s.reward for s in group(["1"], score=lambda response, answer: True)] == [1.0]


def test_an_exception_is_recorded_and_the_others_are_scored():
    def score(response, answer):
        if response == "bad":
            raise KeyError("no such unit")
        return 1.0

    good, bad = group(["1", "bad"], score=score)
    assert good.reward == 1.0
    assert math.isnan(bad.reward)
    assert bad.error == "KeyError: 'no such unit'"


def test_failed_samples_do_not_vote():
    def score(response, answer):
        if response == "bad":
            raise ValueError("bad")
        return 0.0

    scores = group(["bad", "bad", "2"], score=score, kind="majority_vote")
    assert [s.error for s in scores] == ["ValueError: bad", "ValueError: bad", None]
    assert scores[2].reward == 1.0

    score.extract = lambda response: 1 / 0
    assert group(["2"], score=score, kind="majority_vote")[0].error == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "salt"}, "noise kind 'salt': use one of none, flip, gaussian, majority_vote"),
        ({"kind": "flip", "p": 1.5}, r"noise p=1\.5"),
        ({"kind": "gaussian", "sd": -1.0}, r"noise sd=-1\.0"),
        ({"kind": "gaussian", "sd": math.nan}, "noise sd=nan"),
    ],
)
def test_spec_is_checked(spec, message):
    with pytest.raises(ConfigError, match=message):
        NoiseSpec(**spec)


def test_seeds_must_match():
    with pytest.raises(ValueError, match="2 responses but 1 seeds"):
        score_group(["1", "2"], "1", score=EXACT, noise=NoiseSpec(), seeds=[1])
