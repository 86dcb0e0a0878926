"""Turning samples into tensors."""

from __future__ import annotations

import math

import torch

from dvpo_service.data.collate import collate, readable_rows, rollout_metrics, without_spread
from dvpo_service.types import PartScore, Prompt, Sample, Score

PROMPTS = [Prompt(i, ({"role": "user", "content": f"{i}?"},), "1", "t", (5,) * (i + 2)) for i in range(2)]


def sample(i: int, j: int, *tokens: int, finish: str = "stop") -> Sample:
    return Sample(i, j, tokens, tuple(-0.1 * t for t in tokens), "x", finish, 3)  # type: ignore[arg-type]


GROUPS = [[sample(0, 0, 7, 8, 1), sample(0, 1, 9)], [sample(1, 0, 7, 1), sample(1, 1, 6, 6, 6, 6, finish="length")]]
SCORES = [[Score(1.0, 0.0), Score(0.0, 0.0)], [Score(math.nan, math.nan, "boom"), Score(0.5, 1.0)]]


def test_layout() -> None:
    r = collate(PROMPTS, GROUPS, SCORES)
    assert r.tokens.tolist()[0] == [5, 5, 7, 8, 1, 0, 0]
    assert r.tokens.tolist()[3] == [5, 5, 5, 6, 6, 6, 6]
    assert r.prompt_lens.tolist() == [2, 2, 3, 3]
    assert r.response_lens.tolist() == [3, 1, 2, 4]
    assert r.finished.tolist() == [True, True, True, False]
    assert r.rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.5]]
    torch.testing.assert_close(r.rollout_logprobs[0], torch.tensor([-0.7, -0.8, -0.1, 0.0]))


def test_a_failed_sample_is_in_no_mask_and_no_mean() -> None:
    r = collate(PROMPTS, GROUPS, SCORES)
    assert r.response_mask.sum(1).tolist() == [3, 1, 0, 4]
    assert r.num_tokens == 8
    metrics = rollout_metrics(r, 2, version=4)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/failed"] == 1
    assert metrics["rollout/staleness"] == 1
    assert metrics["rollout/truncated"] == 0.25


def test_select_trims_to_the_rows_it_takes() -> None:
    part = collate(PROMPTS, GROUPS, SCORES).select(torch.tensor([1, 0]))
    assert part.tokens.tolist() == [[5, 5, 9, 0, 0], [5, 5, 7, 8, 1]]
    assert part.response_mask.shape == (2, 3)
    assert part.scores.tolist() == [0.0, 1.0]


def test_rows_for_a_person() -> None:
    parts = (PartScore("style", 0.25, 0.5),)
    rows = readable_rows(PROMPTS, GROUPS, [[Score(1.0, 0.0, parts=parts), SCORES[0][1]], SCORES[1]])
    assert len(rows) == 4
    assert (rows[0]["reward_style"], "reward_style" in rows[1]) == (0.25, False)
    assert rows[0]["prompt"] == "0?"
    assert (rows[0]["reward"], rows[0]["clean_reward"]) == (1.0, 0.0)
    assert rows[2]["error"] == "boom"


def test_a_failed_sample_is_no_spread() -> None:
    nan = float("nan")
    groups = torch.tensor([[1.0, 1.0, nan], [0.0, 1.0, nan], [nan, nan, nan], [0.5, 0.5, 0.5], [nan, 1.0, 0.0]])
    assert without_spread(groups).tolist() == [True, False, True, True, False]
