"""Several rewards with weights: their sum, with and without normalisation, against a reference in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvpo_service.config import Config, RewardConfig, load_config, to_yaml
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.splits import check_sources
from dvpo_service.errors import ConfigError
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.combine import combine
from dvpo_service.rewards.scoring import Result
from dvpo_service.types import Prompt, Score

GROUPS, N = 3, 5
RNG = np.random.default_rng(0)
RAW = RNG.normal(size=(GROUPS, N, 2)) * [1.0, 40.0] + [0.0, 100.0]  # two rewards of very different sizes
WEIGHTS = np.array([2.0, -0.5])
PARTS = [{"function": "exact_match", "weight": 2.0}, {"function": "my:style", "name": "style", "weight": -0.5}]


def config(normalise: str = "none", parts: Any = PARTS, **more: Any) -> RewardConfig:
    return RewardConfig.model_validate({"rewards": parts, "normalise": normalise, **more})


def scored(normalise: str, raw: Any = RAW, *, training: bool = True, **more: Any) -> list[list[Score]]:
    groups = [Work(["r"] * raw.shape[1], "a", list(range(raw.shape[1])), "s") for _ in raw]
    results = [{k: [_result(x) for x in group[:, k]] for k in range(raw.shape[2])} for group in raw]
    return combine(config(normalise, **more), groups, results, training=training)


def _result(value: float) -> Result:
    return Result(float(value), error="it raised" if math.isnan(value) else None)


def rewards(scores: list[list[Score]]) -> np.ndarray:
    return np.array([[s.reward for s in group] for group in scores])


def test_without_normalisation_the_reward_is_the_weighted_sum() -> None:
    scores = scored("none")
    np.testing.assert_allclose(rewards(scores), RAW @ WEIGHTS, rtol=1e-12)
    assert [[s.clean for s in g] for g in scores] == [[s.reward for s in g] for g in scores]
    first = scores[0][0].parts
    assert [(p.name, p.raw) for p in first] == [("exact_match", RAW[0, 0, 0]), ("style", RAW[0, 0, 1])]
    assert [p.weighted for p in first] == pytest.approx(list(RAW[0, 0] * WEIGHTS))


def test_in_training_the_reward_is_within_its_bounds_after_noise() -> None:
    noise = {"kind": "spike", "p": 1.0, "sd": 500.0}
    found = rewards(scored("none", clip=[-1.0, 3.0], noise=noise))
    free = rewards(scored("none", noise=noise))
    np.testing.assert_allclose(found, free.clip(-1.0, 3.0))
    assert free.min() < -1.0
    assert free.max() > 3.0
    tested = scored("none", clip=[-1.0, 3.0], training=False)
    np.testing.assert_allclose(rewards(tested), RAW @ WEIGHTS, err_msg="an evaluation is not bounded")


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="lowest reward first"):
        config(clip=[1.0, 0.0])


@pytest.mark.parametrize(("normalise", "axes"), [("group", (1,)), ("batch", (0, 1))])
def test_normalised_before_the_sum(normalise: str, axes: tuple[int, ...]) -> None:
    mean, sd = RAW.mean(axis=axes, keepdims=True), RAW.std(axis=axes, ddof=1, keepdims=True)
    scores = scored(normalise)
    np.testing.assert_allclose(rewards(scores), ((RAW - mean) / (sd + 1e-6)) @ WEIGHTS, rtol=1e-12)
    np.testing.assert_allclose([[s.clean for s in g] for g in scores], RAW @ WEIGHTS, err_msg="clean is the plain sum")
    assert scores[0][0].parts[1].weighted == pytest.approx(-0.5 * RAW[0, 0, 1]), "a part's own mean would be 0"
    plain = scored(normalise, training=False)
    np.testing.assert_allclose(rewards(plain), RAW @ WEIGHTS, err_msg="an evaluation does not normalise")


@pytest.mark.parametrize(("normalise", "axes"), [("group", (1,)), ("batch", (0, 1))])
def test_a_failed_score_counts_in_no_mean_and_fails_its_response(normalise: str, axes: tuple[int, ...]) -> None:
    raw = RAW.copy()
    raw[1, 2, 1] = np.nan
    mean, sd = np.nanmean(raw, axis=axes, keepdims=True), np.nanstd(raw, axis=axes, ddof=1, keepdims=True)
    scores = scored(normalise, raw)
    np.testing.assert_allclose(rewards(scores), ((raw - mean) / (sd + 1e-6)) @ WEIGHTS, rtol=1e-12)
    failed = scores[1][2]
    assert (math.isnan(failed.reward), math.isnan(failed.clean), failed.error) == (True, True, "style: it raised")
    assert [math.isnan(p.raw) for p in failed.parts] == [False, True], "each reward has its own failures"


def test_what_does_not_differ_adds_nothing() -> None:
    raw = RAW.copy()
    raw[0, :, 1] = 0.1  # whose standard deviation is 1e-17 in floating point
    first = 2.0 * (raw[0, :, 0] - raw[0, :, 0].mean()) / (raw[0, :, 0].std(ddof=1) + 1e-6)
    np.testing.assert_allclose(rewards(scored("group", raw))[0], first, rtol=1e-12)
    lone = scored("group", RAW[:, :1])
    assert rewards(lone).tolist() == [[0.0]] * GROUPS


def test_a_reward_of_weight_0_is_measured_and_costs_nothing() -> None:
    parts = [PARTS[0], PARTS[1] | {"weight": 0.0}]
    raw = RAW.copy()
    raw[0, 0, 1] = np.nan
    scores = scored("none", raw, parts=parts)
    np.testing.assert_allclose(rewards(scores), 2.0 * raw[:, :, 0])
    assert (scores[0][0].error, scores[0][1].parts[1].raw) == (None, raw[0, 1, 1])


def test_each_source_has_its_own_rewards() -> None:
    groups = [Work(["r"], "a", [0], source) for source in ("a", "b", "c")]
    results = [{0: [Result(1.0, {"m": 5.0})]}, {0: [Result(1.0)], 1: [Result(2.0)]}, {}]
    [[a], [b], [c]] = combine(config(), groups, results, training=True)
    assert (a.reward, b.reward) == (2.0, 1.0)
    assert a.metrics == {"exact_match/m": 5.0}, "metrics of several rewards have their names"
    assert (math.isnan(c.reward), c.error) == (True, "none of reward.rewards scores the prompt's source")


def test_noise_comes_after_the_sum() -> None:
    quiet, noisy = scored("group"), scored("group", noise={"kind": "gaussian", "sd": 0.5})
    added = rewards(noisy) - rewards(quiet)
    assert np.abs(added).min() > 0
    np.testing.assert_allclose(added[0], added[1], err_msg="the noise depends on the seed alone")
    assert [s.clean for s in noisy[0]] == [s.clean for s in quiet[0]]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"function": "gsm8k", "rewards": PARTS}, "reward.function is one reward and reward.rewards a list of them"),
        ({"rewards": []}, "at least 1 item"),
        ({"rewards": [{"weight": 1}]}, "the reward 'reward' needs exactly one of function"),
        ({"rewards": [PARTS[0], PARTS[0]]}, "two of reward.rewards are named 'exact_match'; give each a name"),
        ({"rewards": [PARTS[0] | {"weight": 0}]}, "every weight of reward.rewards is 0"),
        ({"normalise": "group"}, "reward.normalise is for reward.rewards"),
        ({"rewards": PARTS, "noise": {"kind": "majority_vote"}}, "majority_vote noise replaces the reward by a vote"),
        ({"rewards": [{"function": "gsm8k", "weigth": 2}]}, "Extra inputs are not permitted"),
    ],
)
def test_what_does_not_go_together_is_said(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate(reward)


def test_a_list_over_a_config_with_a_function_replaces_it_and_survives_yaml(tmp_path: Path) -> None:
    both = load_config("demo", ['reward.rewards=[{function: exact_match}, {function: "my:f", weight: 0.1}]'])
    assert (both.reward.function, [p.name for p in both.reward.parts]) == (None, ["exact_match", "f"])
    assert both.reward.words == "1 exact_match + 0.1 f"
    (tmp_path / "config.yaml").write_text(to_yaml(both))
    again: Config = load_config(str(tmp_path / "config.yaml"))
    assert again == both
    assert load_config(str(tmp_path / "config.yaml"), ["reward.function=gsm8k"]).reward.rewards is None
    with pytest.raises(ConfigError, match="null clears the other"):
        load_config("demo", ["reward.function=gsm8k", "reward.rewards=[{function: exact_match}]"])


def test_every_source_has_a_reward_and_every_reward_its_source() -> None:
    rows = tuple(Prompt(i, ({"role": "user", "content": "?"},), "1", source) for i, source in enumerate("ab"))
    train = Dataset("train", rows, ("", ""))
    check_sources(config(parts=[{"function": "gsm8k", "sources": ["a"]}, {"function": "exact_match"}]), train)
    with pytest.raises(ConfigError, match="the sources of the reward 'gsm8k': c: no training prompt has that"):
        check_sources(config(parts=[{"function": "gsm8k", "sources": ["c"]}, {"function": "exact_match"}]), train)
    with pytest.raises(ConfigError, match=r"none of reward\.rewards scores the prompts of data_source 'b'"):
        check_sources(config(parts=[{"function": "gsm8k", "sources": ["a"]}]), train)
