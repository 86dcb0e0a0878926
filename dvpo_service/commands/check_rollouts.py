"""What would make every rollout useless, found before anything starts: a reward that fails, truncated sampling."""

from __future__ import annotations

import threading

from dvpo_service.config import Config, RewardConfig, RolloutConfig
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.rewards.noise import NoiseSpec, score_group
from dvpo_service.rewards.scoring import resolve
from dvpo_service.types import Prompt


def check_sampling(rollout: RolloutConfig) -> None:
    """Raise ConfigError where sampling is truncated and nothing says how to weigh its tokens.

    The engine samples from the truncated distribution and reports its log-probs; the trainer computes those of the full
    one, so every importance ratio between the two is off.
    """
    truncated = [f"rollout.top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    truncated += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    if truncated and rollout.importance_correction == "auto":
        raise ConfigError(
            f"{' and '.join(truncated)}: the engine samples from a truncated distribution, the trainer computes the "
            "full one. Use top_p=1 and top_k=-1, or say how to weigh the tokens: rollout.importance_correction="
            "truncated, masked, or none to train on them as they are"
        )


def check_reward(config: RewardConfig, prompt: Prompt) -> None:
    """Score the answer of one training row, and raise ConfigError where the reward fails on it.

    Raises:
      ConfigError: the function is not there, raises, returns no finite number, or does not answer within
        ``reward.timeout_s``.
    """
    function = resolve(config.function)
    errors: list[str | None] = []

    def score() -> None:
        scores = score_group([prompt.answer], prompt.answer, score=function, noise=NoiseSpec("none"), seeds=[0])
        errors.append(scores[0].error)

    thread = threading.Thread(target=score, name="try the reward", daemon=True)
    thread.start()
    thread.join(config.timeout_s)
    error = errors[0] if errors else f"no answer within reward.timeout_s = {config.timeout_s:g} s"
    if error is not None:
        raise ConfigError(
            f"reward {config.function!r}: it fails on the answer of the first training row, "
            f"{one_line(prompt.answer, 80)!r}: {one_line(error)}. Mend the reward or the data"
        )


def check_rollouts(config: Config, first: Prompt) -> None:
    """Check sampling and reward; ``first`` is a training row. Raises ConfigError."""
    check_sampling(config.rollout)
    check_reward(config.reward, first)
