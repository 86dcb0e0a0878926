"""Every rule gives an alert on its case, gives none on a healthy run, and does not repeat itself too often."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

from dvpo_service.alerts import RULES, Advisor
from dvpo_service.config.load import known_keys

DOC = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
KEY = re.compile(r"\b(?:model|data|rollout|reward|algorithm|critic|policy|trainer|tracking|cluster)\.[a-z_.]*[a-z_]")
NAMES = [rule.name for rule in RULES]


def healthy(step: int) -> dict[str, float]:
    """Return a step of a run that learns: reward from 0.4 to 0.8, entropy from 1 to 0.3, with noise."""
    rng = random.Random(step)
    done = min(step / 150, 1.0)
    metrics = {
        "reward/mean": 0.4 + 0.4 * done + rng.gauss(0, 0.03),
        "reward/failed": 0.0,
        "reward/groups_without_spread": 0.3 + 0.2 * done,
        "reward/between_prompts": 0.3 + rng.gauss(0, 0.05),
        "rollout/truncated": 0.05,
        "rollout/staleness": 0.0,
        "policy/rollout_kl": 1e-5,
        "policy/rollout_ess": 0.999,
        "policy/clip_fraction": 0.1 * rng.random(),
        "policy/approx_kl": 0.01 * rng.random(),
        "policy/ref_kl": 0.1 * done,
        "policy/entropy": 1.0 - 0.7 * done,
        "policy/grad_norm": 2 * rng.random(),
        "policy/skipped_steps": 0.0,
        "critic/skipped_steps": 0.0,
        "critic/grad_norm": 3 * rng.random(),
        "critic/explained_variance": 0.3 * done + rng.gauss(0, 0.03) if step > 10 else 0.0,
        "critic/quantile_mean": 0.4 + 0.4 * done if step > 10 else 0.0,
        "critic/return_mean": 0.4 + 0.4 * done,
        "critic/return_sd": 0.48 - 0.08 * done,
        "critic/crossing_rate": 0.5,
        "critic/head_disagreement": 0.005,
        "critic/calibration_error": 0.04 if step > 10 else 0.4,
    }
    return metrics | ({"eval/id/accuracy": 0.4 + 0.3 * done} if step % 25 == 0 else {})


def heard(advisor: Advisor, first: int, last: int, **changes: float) -> list[str]:
    """Return the names of the rules that alert from step ``first`` to ``last`` of a healthy run with ``changes``.

    The names of metrics in ``changes`` may have ``__`` in place of ``/``.
    """
    given = {name.replace("__", "/"): value for name, value in changes.items()}
    lines = [line for step in range(first, last + 1) for line in advisor.check(step, healthy(step) | given)]
    return [re.findall(r"\[(\w+)\]", line)[0] for line in lines]


def test_a_healthy_run_is_left_in_peace() -> None:
    assert heard(Advisor(), 0, 300) == []


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("critic_not_learning", {"critic/explained_variance": -0.01}),
        ("critic_mean_off", {"critic/quantile_mean": 1.0, "critic/return_mean": 0.7}),
        ("quantiles_miscalibrated", {"critic/calibration_error": 0.3}),
        ("quantiles_cross", {"critic/crossing_rate": 0.7}),
        ("heads_are_copies", {"critic/head_disagreement": 0.0}),
        ("heads_disagree", {"critic/head_disagreement": 0.4}),
        ("critic_gradient_clipped", {"critic/grad_norm": 50.0}),
        ("policy_gradient_clipped", {"policy/grad_norm": 50.0}),
        ("clip_fraction_high", {"policy/clip_fraction": 0.5}),
        ("policy_moves_too_far", {"policy/approx_kl": 0.2}),
        ("policy_left_the_reference", {"policy/ref_kl": 1.0}),
        ("entropy_collapsed", {"policy/entropy": 0.01}),
        ("steps_skipped", {"policy/skipped_steps": 1.0}),
        ("engine_differs", {"policy/rollout_kl": 0.05}),
        ("few_effective_samples", {"policy/rollout_ess": 0.2}),
        ("groups_without_spread", {"reward/groups_without_spread": 0.9}),
        ("responses_truncated", {"rollout/truncated": 0.8}),
        ("rewards_fail", {"reward/failed": 3.0}),
        ("reward_falls", {"reward/mean": 0.1}),
    ],
)
def test_each_rule_speaks_once_on_its_case(name: str, bad: dict[str, float]) -> None:
    advisor = Advisor()
    heard(advisor, 0, 59)
    assert heard(advisor, 60, 90, **bad) == [name]


def test_stale_tokens_may_differ_from_the_trainers() -> None:
    advisor = Advisor()
    heard(advisor, 0, 59)
    assert heard(advisor, 60, 90, **{"policy/rollout_kl": 0.05, "rollout/staleness": 1.0}) == []


def test_held_out_falls_while_the_reward_rises() -> None:
    advisor = Advisor()
    assert heard(advisor, 0, 60) == []
    assert heard(advisor, 61, 99, **{"eval/ood/accuracy": 0.7}) == []
    assert heard(advisor, 100, 100, **{"eval/ood/accuracy": 0.5}) == []
    lines = [line for s in range(120, 124) for line in advisor.check(s, healthy(s) | {"eval/ood/accuracy": 0.5})]
    assert len(lines) == 1
    assert "on ood fell from 0.700 to 0.500" in lines[0]


def test_held_out_is_compared_with_the_evaluation_before_training_too() -> None:
    advisor = Advisor(max_grad_norm={"policy": 1.0})
    advisor.check(0, {"eval/val/accuracy": 0.6})  # no reward yet
    alerts = [advisor.check(step, {"reward/mean": 0.3 + step / 100}) for step in range(1, 20)]
    alerts += [advisor.check(step, {"reward/mean": 0.6, "eval/val/accuracy": 0.5}) for step in (20, 40)]
    assert [len(lines) for lines in alerts] == [0] * 20 + [1]
    assert "rose from 0.310 to" in alerts[-1][0]  # the first reward takes the place of the one before training


def test_held_out_and_reward_falling_together_is_not_overfitting() -> None:
    advisor = Advisor()
    heard(advisor, 0, 100)
    names = heard(advisor, 101, 130, **{"reward/mean": 0.2, "eval/id/accuracy": 0.2})
    assert names == ["reward_falls"]


def test_a_rule_waits_speaks_once_and_again_after_fifty_steps() -> None:
    advisor, bad = Advisor(patience=3), {"policy/clip_fraction": 0.5}
    steps = [step for step in range(120) if advisor.check(step, bad)]
    assert steps == [2, 52, 102]


def test_a_rule_speaks_again_when_it_was_good_in_between() -> None:
    advisor = Advisor(patience=2)
    shares = [0.5, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5]
    assert [i for i, share in enumerate(shares) if advisor.check(i, {"policy/clip_fraction": share})] == [1, 5]


@pytest.mark.parametrize("gap", [{}, {"policy/clip_fraction": math.nan}, {"policy/clip_fraction": math.inf}])
def test_what_is_not_measured_fires_nothing_and_breaks_nothing(gap: dict[str, float]) -> None:
    advisor, bad = Advisor(patience=2), {"policy/clip_fraction": 0.5}
    assert advisor.check(1, bad) == []
    assert advisor.check(2, gap) == []
    assert len(advisor.check(3, bad)) == 1


def test_metrics_that_are_all_nan_say_nothing() -> None:
    advisor = Advisor(patience=1)
    everything = dict.fromkeys(healthy(0), math.nan)
    assert [advisor.check(step, everything) for step in range(30)] == [[]] * 30


def test_a_critic_may_be_bad_at_first() -> None:
    advisor = Advisor(patience=1)
    bad = {"critic/explained_variance": -0.5, "critic/calibration_error": 0.4, "critic/crossing_rate": 0.9}
    assert [advisor.check(step, bad) for step in range(20)] == [[]] * 20
    assert len(advisor.check(20, bad)) == 3


def test_a_critic_that_explains_nothing_is_held_against_what_prompts_tell() -> None:
    bad = {"critic/explained_variance": 0.001}
    for given, ending in (({}, "would. Let"), ({"reward/between_prompts": 0.314}, "31% of the rewards' variance lies")):
        advisor = Advisor(patience=1)
        [line] = [line for step in range(21) for line in advisor.check(step, bad | given)]
        assert ending in line


def test_a_solved_task_is_no_critic_bias() -> None:
    """All returns are equal, so their current standard deviation is 0; a gap of 0.02 is still small."""
    advisor = Advisor()
    heard(advisor, 0, 40)
    solved = {"critic/return_mean": 1.0, "critic/return_sd": 0.0, "critic/quantile_mean": 0.98}
    assert heard(advisor, 41, 80, **solved) == []


def test_gradient_norms_are_measured_in_the_clip() -> None:
    bad = {"critic/grad_norm": 50.0, "policy/grad_norm": 50.0}
    assert heard(Advisor(max_grad_norm={"critic": 10.0}), 0, 30, **bad) == ["policy_gradient_clipped"]


def test_the_line_has_step_name_and_number() -> None:
    line = Advisor(patience=1).check(7, {"policy/clip_fraction": 0.456})[0]
    assert line.startswith("step 7 [clip_fraction_high] 46% of the tokens are clipped")


def test_patience_is_positive() -> None:
    with pytest.raises(ValueError, match="patience"):
        Advisor(patience=0)


def test_names_are_unique_and_every_rule_names_a_known_key() -> None:
    assert len(set(NAMES)) == len(NAMES)
    known = set(known_keys())
    for rule in RULES:
        assert KEY.findall(rule.helps), rule.name
        assert set(KEY.findall(rule.helps)) <= known, rule.name


def test_the_documentation_has_every_rule_as_it_is() -> None:
    rows = [f"| `{rule.name}` | {rule.condition.when} | {rule.helps} |" for rule in RULES]
    missing = [row for row in rows if row not in DOC]
    assert not missing, "\n".join(["docs/troubleshooting.md lacks these rows:", *missing])
    in_table = re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)
    assert in_table == NAMES


def test_the_documentation_names_known_keys() -> None:
    assert set(KEY.findall(DOC)) <= set(known_keys())
