"""What would make every rollout useless, found before anything starts: a reward that fails, truncated sampling."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from dvpo_service.config import Config, RewardConfig, RolloutConfig
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.splits import Data, check_sources
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.rewards.calling import ONE, Work
from dvpo_service.rewards.parts import columns_of, load_part
from dvpo_service.rewards.scoring import OF_TEXT
from dvpo_service.rewards.try_one import BROKEN
from dvpo_service.types import Prompt, answer_text


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


def check_reward(config: RewardConfig, number: int, prompt: Prompt) -> None:
    """Score the answer of one training row with reward ``number``, in a process of its own, as a worker would.

    Raises:
      ConfigError: the reward cannot be loaded, uses a name or module that is not there, returns no finite number,
        crashes, or does not answer within ``reward.timeout_s``. Another error may be due to this row, and passes:
        ``reward/failed`` counts such samples in training.
    """
    part = config.parts[number]
    if part.model:
        from dvpo_service.rewards.model import check_reward_model

        check_reward_model(part.model)  # a pass through the model would need its device
        return
    load_part(config, part)  # before a process starts
    answer = answer_text(prompt.answer)
    work = Work([answer], prompt.answer, [0], prompt.source, dict(prompt.row), prompt.messages)
    given = {"reward": config.model_dump(mode="json"), "part": number, "work": asdict(work)}
    command = [sys.executable, "-m", "dvpo_service.rewards.try_one"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    limit_s = config.start_timeout_s + config.timeout_of(part)
    text = json.dumps(given, default=str)
    try:
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        error = f"no answer within reward.start_timeout_s + reward.timeout_s = {limit_s:g} s"
    else:
        if done.returncode == 0:
            return
        last = done.stderr.strip().rpartition("\n")[2]
        error = last if done.returncode == BROKEN else f"its process ended with exit code {done.returncode}: {last}"
    raise ConfigError(
        f"reward {part.words!r}: it fails on the answer of the first training row, "
        f"{one_line(answer, 80)!r}: {one_line(error)}. Mend the reward or the data"
    )


def check_rows(config: RewardConfig, splits: Iterable[Dataset]) -> None:
    """Raise ConfigError where a row lacks a column that a reward takes, or has an answer that it cannot compare."""
    for part in config.parts:
        columns = columns_of(part)
        for split in splits:
            for where, prompt in zip(split.origins, split.prompts, strict=True):
                if part.scores(prompt.source):
                    _check_row(part.words, columns, where, prompt)


def _check_row(reward: str, columns: Sequence[str], where: str, prompt: Prompt) -> None:
    if reward in OF_TEXT and not isinstance(prompt.answer, str):
        raise ConfigError(
            f"reward {reward!r}: it compares with an answer that is text, and that of {where} is "
            f"{one_line(answer_text(prompt.answer), 60)}; choose a reward that takes it (docs/rewards.md)"
        )
    if reward == "code":
        _check_tests(where, prompt)
    for column in columns:
        if column not in prompt.row:
            near = difflib.get_close_matches(column, [*prompt.row, *ONE], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"reward {reward!r}: it takes the column {column!r}, which {where} has not; {hint}The columns there "
                f"are {', '.join(sorted(prompt.row))}. Mend the data or the reward; a column that rows may lack "
                "needs a default"
            )


def _check_tests(where: str, prompt: Prompt) -> None:
    from dvpo_service.rewards.code import tests_of

    try:
        tests_of(prompt.answer)
    except ValueError as error:
        raise ConfigError(f"reward 'code': {where}: {error} (docs/rewards.md); mend the row") from error


def check_rollouts(config: Config, data: Data) -> None:
    """Check sampling, and the rewards on the data. Raises ConfigError."""
    check_sampling(config.rollout)
    check_sources(config.reward, data.train)
    check_rows(config.reward, [data.train, *data.held_out.values()])
    for number, part in enumerate(config.reward.parts):
        check_reward(config.reward, number, next(p for p in data.train.prompts if part.scores(p.source)))
