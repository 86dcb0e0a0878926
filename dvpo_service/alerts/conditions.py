"""When a measurement is bad. A condition that needs more than one number is a function of the history."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dvpo_service.alerts.history import History, Missing

Found = dict[str, float | str]


@dataclass(frozen=True)
class Condition:
    """``find`` gives the numbers to report when it is bad, None when good; it raises Missing when it cannot tell."""

    when: str  # the same in words, for the documentation
    find: Callable[[History], Found | None]


def limit(name: str, sign: Literal["<", ">"], bound: float, *, smooth: bool = False) -> Condition:
    """The metric, or its running mean with ``smooth``, is beyond ``bound``; reported as ``value``."""
    beyond = operator.gt if sign == ">" else operator.lt

    def find(h: History) -> Found | None:
        value = h.past(name).mean if smooth else h[name]
        return {"value": value} if beyond(value, bound) else None

    return Condition(f"{'running mean of ' if smooth else ''}`{name}` {sign} {bound:g}", find)


def critic_explains_nothing(bound: float) -> Condition:
    """The running mean of the explained variance is below ``bound``; ``at_best`` says what prompts alone could tell."""
    name, share = "critic/explained_variance", "reward/between_prompts"

    def find(h: History) -> Found | None:
        value = h.past(name).mean
        if value >= bound:
            return None
        try:
            at_best = f" {max(0.0, h.past(share).mean):.0%} of the rewards' variance lies between prompts."
        except Missing:  # one response a prompt tells nothing of it
            at_best = ""
        return {"value": value, "at_best": at_best}

    return Condition(f"running mean of `{name}` < {bound:g}", find)


def critic_mean_off(sds: float) -> Condition:
    """The critic's mean is more than ``sds`` standard deviations of the returns from their mean."""

    def find(h: History) -> Found | None:
        value, mean = h["critic/quantile_mean"], h["critic/return_mean"]
        # The largest sd so far: once nearly every answer is right, the sd of the moment says nothing of the scale.
        sd = h.past("critic/return_sd").highest
        gap = abs(value - mean)
        return {"value": value, "mean": mean, "gap": gap / sd} if sd > 0 and gap > sds * sd else None

    return Condition(f"`critic/quantile_mean` more than {sds:g} `critic/return_sd` from `critic/return_mean`", find)


def fresh_engine_differs(bound: float) -> Condition:
    """``policy/rollout_kl`` is beyond ``bound`` though the weights are the same; stale tokens do differ."""

    def find(h: History) -> Found | None:
        value = h["policy/rollout_kl"]
        stale = sum(h.measured("rollout/staleness"))
        return {"value": value} if value > bound and stale == 0 else None

    return Condition(f"`policy/rollout_kl` > {bound:g} where `rollout/staleness` is 0", find)


def head_spread(sign: Literal["<", ">"], share: float) -> Condition:
    """The heads' disagreement is beyond ``share`` of the returns' standard deviation."""
    beyond = operator.gt if sign == ">" else operator.lt

    def find(h: History) -> Found | None:
        value, sd = h["critic/head_disagreement"], h.past("critic/return_sd").highest
        return {"value": value, "share": value / sd} if sd > 0 and beyond(value / sd, share) else None

    return Condition(f"`critic/head_disagreement` {sign} {share:g} x `critic/return_sd`", find)


def gradient_clipped(pool: Literal["policy", "critic"], times: float) -> Condition:
    """The running mean of the gradient norm, before clipping, is beyond ``times`` the clip."""

    def find(h: History) -> Found | None:
        mean, clip = h.past(f"{pool}/grad_norm").mean, h.max_grad_norm[pool]
        return {"value": mean, "times": mean / clip} if mean > times * clip else None

    return Condition(f"running mean of `{pool}/grad_norm` > {times:g} x `{pool}.optim.max_grad_norm`", find)


def entropy_collapsed(share: float) -> Condition:
    """The policy's entropy is below ``share`` of its first value."""

    def find(h: History) -> Found | None:
        value, first = h["policy/entropy"], h.past("policy/entropy").first
        return {"value": value, "first": first} if value < share * first else None

    return Condition(f"`policy/entropy` < {share:g} x its first value", find)


def steps_skipped() -> Condition:
    """Any optimizer step of either pool was left out."""

    def find(h: History) -> Found | None:
        skipped = sum(h.measured("policy/skipped_steps", "critic/skipped_steps"))
        return {"value": skipped} if skipped > 0 else None

    return Condition("`policy/skipped_steps` or `critic/skipped_steps` > 0", find)


def reward_falls(share: float) -> Condition:
    """The reward's running mean is below its best by ``share`` of it, and by more than noise."""

    def find(h: History) -> Found | None:
        reward = h.past("reward/mean")
        best, mean = reward.best_mean, reward.mean
        # Twice the sd of single steps is six standard errors of a mean of ten.
        return {"value": mean, "best": best} if best - mean > max(share * abs(best), 2 * reward.sd) else None

    return Condition(f"running mean of `reward/mean` {share:.0%} below its best", find)


def held_out_falls(drop: float) -> Condition:
    """A split's accuracy is ``drop`` below its best while the training reward is above what it was then."""

    def find(h: History) -> Found | None:
        reward, names = h.past("reward/mean"), h.accuracies()
        if not names:
            raise Missing("eval/<split>/accuracy")
        worst = max(names, key=lambda name: h.past(name).highest - h[name])
        best, before = h.past(worst).highest, h.reward_at_best(worst)
        if best - h[worst] <= drop or reward.mean <= before + reward.sd / 2:
            return None
        split = worst.split("/")[1]
        return {"split": split, "best": best, "value": h[worst], "before": before, "reward": reward.mean}

    return Condition(f"`eval/<split>/accuracy` {drop:g} below its best while `reward/mean` has risen since", find)
