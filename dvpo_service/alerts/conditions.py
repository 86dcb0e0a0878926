"""The conditions under which a metric is bad. Each function returns a condition for the bounds it is given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dvpo_service.alerts.history import History, Missing

Found = dict[str, float | str]


@dataclass(frozen=True)
class Condition:
    """A condition on the metrics.

    Attributes:
      when: the condition in words, for the documentation.
      find: returns the numbers to report when the condition is met (bad), or None when it is not (good). Raises Missing
        when a metric that it needs was not measured.
    """

    when: str
    find: Callable[[History], Found | None]


def limit(name: str, sign: Literal["<", ">"], bound: float, *, smooth: bool = False) -> Condition:
    """Bad when the metric, or its running mean with ``smooth``, is above (">") or below ("<") ``bound``."""
    beyond = operator.gt if sign == ">" else operator.lt

    def find(h: History) -> Found | None:
        value = h.past(name).mean if smooth else h[name]
        return {"value": value} if beyond(value, bound) else None

    return Condition(f"{'running mean of ' if smooth else ''}`{name}` {sign} {bound:g}", find)


def critic_explains_nothing(bound: float) -> Condition:
    """Bad when the running mean of the explained variance is below ``bound``.

    ``at_best`` reports the share of the rewards' variance that lies between prompts.
    """
    name = "critic/explained_variance"
    share = "reward/between_prompts"

    def find(h: History) -> Found | None:
        value = h.past(name).mean
        if value >= bound:
            return None
        try:
            at_best = f" {max(0.0, h.past(share).mean):.0%} of the rewards' variance lies between prompts."
        except Missing:  # not measured with one response per prompt
            at_best = ""
        return {"value": value, "at_best": at_best}

    return Condition(f"running mean of `{name}` < {bound:g}", find)


def critic_mean_off(sds: float) -> Condition:
    """Bad when the critic's mean is more than ``sds`` standard deviations of the returns from the returns' mean."""

    def find(h: History) -> Found | None:
        value = h["critic/quantile_mean"]
        mean = h["critic/return_mean"]
        # The largest sd so far: once nearly every answer is right, the current sd says nothing about the scale.
        sd = h.past("critic/return_sd").highest
        gap = abs(value - mean)
        return {"value": value, "mean": mean, "gap": gap / sd} if sd > 0 and gap > sds * sd else None

    return Condition(f"`critic/quantile_mean` more than {sds:g} `critic/return_sd` from `critic/return_mean`", find)


def fresh_engine_differs(bound: float) -> Condition:
    """Bad when ``policy/rollout_kl`` is above ``bound`` although engine and trainer have the same weights.

    Stale tokens were sampled by older weights, so their log-probs do differ.
    """

    def find(h: History) -> Found | None:
        value = h["policy/rollout_kl"]
        stale = sum(h.measured("rollout/staleness"))
        return {"value": value} if value > bound and stale == 0 else None

    return Condition(f"`policy/rollout_kl` > {bound:g} where `rollout/staleness` is 0", find)


def head_spread(sign: Literal["<", ">"], share: float) -> Condition:
    """Bad when the heads' disagreement is above or below ``share`` of the returns' standard deviation."""
    beyond = operator.gt if sign == ">" else operator.lt

    def find(h: History) -> Found | None:
        value = h["critic/head_disagreement"]
        sd = h.past("critic/return_sd").highest
        return {"value": value, "share": value / sd} if sd > 0 and beyond(value / sd, share) else None

    return Condition(f"`critic/head_disagreement` {sign} {share:g} x `critic/return_sd`", find)


def gradient_clipped(pool: Literal["policy", "critic"], times: float) -> Condition:
    """Bad when the running mean of the gradient norm, before clipping, is above ``times`` the clipping bound."""

    def find(h: History) -> Found | None:
        mean = h.past(f"{pool}/grad_norm").mean
        clip = h.max_grad_norm[pool]
        return {"value": mean, "times": mean / clip} if mean > times * clip else None

    return Condition(f"running mean of `{pool}/grad_norm` > {times:g} x `{pool}.optim.max_grad_norm`", find)


def entropy_collapsed(share: float) -> Condition:
    """Bad when the policy's entropy is below ``share`` of its first value."""

    def find(h: History) -> Found | None:
        value = h["policy/entropy"]
        first = h.past("policy/entropy").first
        return {"value": value, "first": first} if value < share * first else None

    return Condition(f"`policy/entropy` < {share:g} x its first value", find)


def steps_skipped() -> Condition:
    """Bad when an optimizer step of either pool was skipped."""

    def find(h: History) -> Found | None:
        skipped = sum(h.measured("policy/skipped_steps", "critic/skipped_steps"))
        return {"value": skipped} if skipped > 0 else None

    return Condition("`policy/skipped_steps` or `critic/skipped_steps` > 0", find)


def reward_falls(share: float) -> Condition:
    """Bad when the reward's running mean is below its best by more than ``share`` of the best, and beyond noise."""

    def find(h: History) -> Found | None:
        reward = h.past("reward/mean")
        best = reward.best_mean
        mean = reward.mean
        # Twice the sd of single steps is six standard errors of a mean of ten steps.
        return {"value": mean, "best": best} if best - mean > max(share * abs(best), 2 * reward.sd) else None

    return Condition(f"running mean of `reward/mean` {share:.0%} below its best", find)


def held_out_falls(drop: float) -> Condition:
    """Bad when a split's accuracy is ``drop`` below its best while the training reward has risen since then."""

    def find(h: History) -> Found | None:
        reward = h.past("reward/mean")
        names = h.accuracies()
        if not names:
            raise Missing("eval/<split>/accuracy")
        worst = max(names, key=lambda name: h.past(name).highest - h[name])
        best = h.past(worst).highest
        before = h.reward_at_best(worst)
        if best - h[worst] <= drop or reward.mean <= before + reward.sd / 2:
            return None
        split = worst.split("/")[1]
        return {"split": split, "best": best, "value": h[worst], "before": before, "reward": reward.mean}

    return Condition(f"`eval/<split>/accuracy` {drop:g} below its best while `reward/mean` has risen since", find)
