import math
import statistics

import pytest

from dvpo_service.config import RewardConfig
from dvpo_service.errors import ConfigError
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.combine import combine
from dvpo_service.rewards.noise import NoiseSpec, add_noise
from dvpo_service.rewards.scoring import Scorer, resolve
from dvpo_service.rewards.seeds import sample_seed
from dvpo_service.types import Score

EXACT = resolve("exact_match")
SEEDS = [sample_seed(0, 0, 0, i) for i in range(4000)]
NORMAL, LEVELS = statistics.NormalDist(), (0.1, 0.25, 0.5, 0.75, 0.9)
SPIKES = [1.0, 10.296993845310134, -18.040940107617075, -7.012497081062275]
STUDENT = [0.9125418917819559, 1.3151614699190417, 0.3391088888044287, 0.6463469997304034]


def group(responses, answer="1", score=EXACT, seeds=SEEDS, **noise):
    scorer = score if isinstance(score, Scorer) else Scorer("own", score, extract=getattr(score, "extract", str))
    work = Work(responses, answer, seeds[: len(responses)])
    results = scorer.results(work, votes=noise.get("kind") == "majority_vote")
    config = RewardConfig.model_validate({"noise": noise})
    [scores] = combine(config, [work], [{0: results}], training=True)
    return scores


def quantiles(xs):
    """Return the quantiles at LEVELS."""
    return [sorted(xs)[int(level * len(xs))] for level in LEVELS]


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


def test_spikes_hit_their_share_with_their_size():
    added = [s.reward - s.clean for s in group(["1"] * 4000, kind="spike", p=0.3, sd=20.0)]
    hits = [x for x in added if x != 0]
    assert len(hits) / 4000 == pytest.approx(0.3, abs=0.02)
    assert quantiles(hits) == pytest.approx([20 * NORMAL.inv_cdf(p) for p in LEVELS], abs=2.0)
    assert {s.clean for s in group(["1"] * 50, kind="spike", p=1.0, sd=20.0)} == {1.0}
    assert all(s.reward == 1.0 for s in group(["1"] * 50, kind="spike", p=0.0, sd=20.0))


@pytest.mark.parametrize(("sign", "factor"), [("up", 1), ("down", -1)])
def test_spikes_of_one_sign_are_those_of_both_folded(sign, factor):
    both, folded = (group(["0"] * 400, kind="spike", p=0.5, sd=3.0, sign=s) for s in ("both", sign))
    assert [s.reward for s in folded] == [factor * abs(s.reward) for s in both]
    assert sum(s.reward != 0 for s in folded) > 100


@pytest.mark.parametrize(
    ("df", "quartile", "decile"), [(1.0, 1.0, 3.078), (2.0, 0.8165, 1.886), (5.0, 0.7267, 1.476), (1e6, 0.6745, 1.2816)]
)
def test_student_t_has_the_quantiles_of_its_table(df, quartile, decile):
    added = [s.reward - s.clean for s in group(["1"] * 4000, kind="student_t", df=df, scale=0.5)]
    expected = [-decile / 2, -quartile / 2, 0.0, quartile / 2, decile / 2]
    assert quantiles(added) == pytest.approx(expected, abs=0.06 if df > 1 else 0.12)
    assert all(math.isfinite(x) for x in added)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ({"kind": "spike", "p": 0.5, "sd": 20.0}, SPIKES),
        ({"kind": "student_t", "df": 2.0, "scale": 0.5}, STUDENT),
    ],
)
def test_added_noise_depends_on_the_seed_alone(noise, expected):
    scores = group(["1"] * 40, **noise)
    assert [s.reward for s in scores[:4]] == pytest.approx(expected, rel=1e-12)  # fixed: runs must stay repeatable
    assert scores[30:33] == group(["1"] * 3, seeds=SEEDS[30:33], **noise)
    assert scores[::-1] == group(["1"] * 40, seeds=SEEDS[:40][::-1], **noise)
    other = group(["0"] * 40, **noise)
    assert [s.reward - 1 for s in scores] == pytest.approx([s.reward for s in other], abs=1e-12)


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
@pytest.mark.parametrize("kind", ["none", "flip", "gaussian", "spike", "student_t", "majority_vote"])
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
        ({"kind": "salt"}, "noise kind 'salt': use one of none, flip, gaussian, spike, student_t, majority_vote"),
        ({"kind": "spike", "sign": "left"}, "noise sign='left': use one of both, up, down"),
        ({"kind": "student_t", "df": 0.5}, r"noise df=0\.5"),
        ({"kind": "student_t", "scale": -1.0}, r"noise scale=-1\.0"),
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
        add_noise([Score(1.0, 1.0)] * 2, noise=NoiseSpec(), seeds=[1])
