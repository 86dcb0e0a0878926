"""What would make every rollout useless, found before anything starts: a reward that fails, truncated sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dvpo_service.config import Config, RewardConfig, RolloutConfig
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.rewards.scoring import resolve
from dvpo_service.rewards.try_one import BROKEN
from dvpo_service.types import Prompt


def check_sampling(rollout: RolloutConfig) -> None:
    """Raise ConfigError where sampling is truncated and nothing says how to weigh its tokens.

    The engine samples from the truncated distribution and reports its log-probs; the trainer computes those of the full
    one, so every importance ratio between the two is off.
    """
    truncated = [f"rollout.top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    truncated += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    if truncated and rollout.importance_correction == "auto" and rollout.correction == "none":
        raise ConfigError(
            f"{' and '.join(truncated)}: the engine samples from a truncated distribution, the trainer computes the "
            "full one. Use top_p=1 and top_k=-1, or say how to weigh the tokens: rollout.importance_correction="
            "truncated, masked, or none to train on them as they are"
        )


def check_reward(config: RewardConfig, prompt: Prompt) -> None:
    """Score the answer of one training row, in a process of its own, as a reward worker would.

    Raises:
      ConfigError: the function cannot be loaded, uses a name or module that is not there, returns no finite number,
        crashes, or does not answer within ``reward.timeout_s``. Another error may be due to this row, and passes:
        ``reward/failed`` counts such samples in training.
    """
    resolve(config.function)  # before a process starts
    command = [sys.executable, "-m", "dvpo_service.rewards.try_one", config.function, str(config.timeout_s)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    limit_s = config.start_timeout_s + config.timeout_s
    try:
        done = subprocess.run(
            command, input=json.dumps(prompt.answer), env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        error = f"no answer within reward.start_timeout_s + reward.timeout_s = {limit_s:g} s"
    else:
        if done.returncode == 0:
            return
        last = done.stderr.strip().rpartition("\n")[2]
        error = last if done.returncode == BROKEN else f"its process ended with exit code {done.returncode}: {last}"
    raise ConfigError(
        f"reward {config.function!r}: it fails on the answer of the first training row, "
        f"{one_line(prompt.answer, 80)!r}: {one_line(error)}. Mend the reward or the data"
    )


def check_rollouts(config: Config, first: Prompt) -> None:
    """Check sampling and reward; ``first`` is a training row. Raises ConfigError."""
    check_sampling(config.rollout)
    check_reward(config.reward, first)
