from __future__ import annotations

import math

import pytest
import torch

from dvpo_service.objectives.measurements import prompt_metrics
from dvpo_service.types import Advantages
from tests.builders import make_rollouts


def test_an_advantage_from_the_clean_outcome_is_all_signal() -> None:
    part = make_rollouts()
    mask = part.response_mask
    advantages = torch.where(mask, part.clean_scores.nan_to_num()[:, None], 0.0)
    metrics = prompt_metrics(part, Advantages(advantages), 1.0)
    assert metrics == {"advantage/clean_correlation": pytest.approx(1.0)}


def test_a_critic_that_knows_the_returns_explains_all_of_them() -> None:
    part = make_rollouts()
    values = torch.where(part.response_mask, part.rewards.flip(1).cumsum(1).flip(1), 0.0)
    metrics = prompt_metrics(part, Advantages(torch.zeros_like(values), values), 1.0)
    assert metrics["critic/explained_variance_within"] == pytest.approx(1.0)
    assert metrics["critic/explained_variance_between"] == pytest.approx(1.0)
    assert metrics["critic/explained_variance_end"] == pytest.approx(1.0)
    assert math.isnan(metrics["advantage/clean_correlation"])


def test_what_is_known_only_at_the_end_counts_in_full_at_the_end_only() -> None:
    part = make_rollouts()
    mask = part.response_mask
    returns = torch.where(mask, part.rewards.flip(1).cumsum(1).flip(1), 0.0)
    last = mask & (torch.arange(mask.shape[1]) == mask.long().cumsum(1).argmax(1, keepdim=True))
    values = torch.where(last, returns, 0.0)
    metrics = prompt_metrics(part, Advantages(torch.zeros_like(values), values), 1.0)
    assert metrics["critic/explained_variance_end"] == pytest.approx(1.0)
    assert metrics["critic/explained_variance_within"] < 0.9
