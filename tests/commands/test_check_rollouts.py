"""What would make every rollout useless is one line before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from dvpo_service.commands.check_rollouts import check_reward, check_sampling
from dvpo_service.config import RewardConfig, RolloutConfig
from dvpo_service.errors import ConfigError
from dvpo_service.types import Prompt

ROW = Prompt(0, ({"role": "user", "content": "1+1="},), "2", "t")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("misspelt", r"it fails on the answer of the first training row, '2': NameError: name 'reponse'"),
        ("endless", r"no answer within reward\.timeout_s = 0\.2 s"),
        ("nothing", r"returned None, not a finite number"),
        ("crashes", r"its process ended with exit code 9"),
    ],
)
def test_a_reward_that_fails_is_found_before_anything_starts(function: str, said: str) -> None:
    config = RewardConfig(function=f"tests.commands.bad_rewards:{function}", timeout_s=0.2)
    with pytest.raises(ConfigError, match=said) as caught:
        check_reward(config, 0, ROW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["exact_match", "gsm8k", "math_verify"])
def test_built_in_rewards_pass(function: str) -> None:
    check_reward(RewardConfig(function=function), 0, ROW)


@pytest.mark.parametrize("function", ["uses_a_signal", "wants_tags"])
def test_what_works_in_a_reward_worker_passes(function: str) -> None:
    check_reward(RewardConfig(function=f"tests.commands.bad_rewards:{function}"), 0, ROW)


@pytest.mark.parametrize("truncated", [{"top_p": 0.5}, {"top_k": 20}])
def test_truncated_sampling_needs_to_be_told_how_tokens_are_weighed(truncated: dict[str, Any]) -> None:
    (key,) = truncated
    with pytest.raises(ConfigError, match=rf"rollout\.{key}=.*: the engine samples from a truncated distribution"):
        check_sampling(RolloutConfig(**truncated))
    check_sampling(RolloutConfig(**truncated, importance_correction="truncated"))
    check_sampling(RolloutConfig(**truncated, importance_correction="none"))
    check_sampling(RolloutConfig(max_staleness=1))
    check_sampling(RolloutConfig(**truncated, max_staleness=1))  # corrected already
