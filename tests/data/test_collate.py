"""Samples to tensors."""

from __future__ import annotations

import math

import pytest
import torch

from dvpo_service.data.collate import between_groups, collate, readable_rows, rollout_metrics
from dvpo_service.types import Prompt, Sample, Score

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
    rows = readable_rows(PROMPTS, GROUPS, SCORES)
    assert len(rows) == 4
    assert rows[0]["prompt"] == "0?"
    assert (rows[0]["reward"], rows[0]["clean_reward"]) == (1.0, 0.0)
    assert rows[2]["error"] == "boom"


def test_the_share_between_prompts_by_the_table_of_shrout_and_fleiss() -> None:
    """Six targets, four judges: ICC(1) is .17 in their paper."""
    table = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert between_groups(torch.tensor(table, dtype=torch.float32)) == pytest.approx(0.1657, abs=1e-4)


def test_the_share_between_prompts_is_that_of_the_law_the_scores_are_drawn_from() -> None:
    torch.manual_seed(0)
    chance = torch.tensor([0.1, 0.9]).repeat(4000)  # variance between: 0.16, of all: 0.25
    assert between_groups(torch.bernoulli(chance[:, None].expand(-1, 8))) == pytest.approx(0.64, abs=0.02)
    assert between_groups(torch.bernoulli(torch.full((8000, 8), 0.3))) == pytest.approx(0.0, abs=0.01)


def test_the_share_between_prompts_leaves_out_groups_with_a_failure_and_is_unknown_without_spread() -> None:
    scores = torch.tensor([[1.0, 1.0], [0.0, 0.0], [math.nan, 0.0]])
    assert between_groups(scores) == 1.0
    for known in (scores[1:], scores[:1], torch.ones(4, 3), torch.rand(5, 1)):
        assert math.isnan(between_groups(known))
