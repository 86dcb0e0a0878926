"""The observer on a fake critic: which responses it sends, and what the tracker receives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from dvpo_service.tracking import observe
from dvpo_service.tracking.observe import FanObserver
from dvpo_service.types import Prompt

HEADS, ATOMS = 3, 5
LEVELS = (torch.arange(ATOMS) + 0.5) / ATOMS


class FakeCritic:
    """A critic whose head h predicts b + h / 10 everywhere along response b, plus the number of calls so far."""

    def __init__(self):
        self.asked = []

    def distributions(self, rollouts):
        self.asked.append(rollouts)
        b, t = rollouts.response_mask.shape
        heads = torch.arange(b)[:, None, None, None] + torch.arange(HEADS)[:, None] / 10 + len(self.asked)
        return LEVELS, heads.expand(b, t, HEADS, ATOMS).float()


class FakeTracker:
    def __init__(self):
        self.pictures = []

    def log_critic_pictures(self, step, charts, history):
        self.pictures.append((step, charts, history))


@pytest.fixture
def observer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [
        Prompt(i, ({"role": "user", "content": question},), answer, "test", tuple(tokenizer(question)["input_ids"]))
        for i, (question, answer) in enumerate([("18+27=", "45"), ("2+3=", "5")])
    ]
    return FanObserver(prompts, tokenizer, FakeCritic(), FakeTracker(), 8)


def test_a_right_and_a_wrong_response_per_prompt_with_every_head(observer):
    observer.observe(10)
    (rollouts,) = observer.critic.asked
    assert rollouts.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    ((step, charts, history),) = observer.tracker.pictures
    assert step == 10
    assert [c.outcome for c in charts] == [1.0, 0.0, 1.0, 0.0]
    assert [c.title for c in charts] == ["18+27= 45", "18+27= 40", "2+3= 5", "2+3= 0"]
    for i, chart in enumerate(charts):
        assert len(chart.tokens) == int(rollouts.response_lens[i])
        assert chart.heads.shape == (len(chart.tokens), HEADS, ATOMS)
        assert chart.quantiles == pytest.approx(i + 0.1 + 1)
        assert chart.levels.tolist() == LEVELS.tolist()
    assert [step for step, _ in history] == [10]


def test_what_was_observed_is_kept_for_the_first_prompt(observer):
    for step in (0, 5, 10):
        observer.observe(step)
    histories = [history for _, _, history in observer.tracker.pictures]
    assert [[step for step, _ in h] for h in histories] == [[0], [0, 5], [0, 5, 10]], "what was handed out stays"
    assert [c.title for c in histories[-1][0][1]] == ["18+27= 45", "18+27= 40"]
    assert [charts[0].quantiles[0, 0] for _, charts in histories[-1]] == pytest.approx([1.1, 2.1, 3.1])


def test_memory_is_bounded_and_the_first_observation_stays(observer, monkeypatch):
    monkeypatch.setattr(observe, "_KEPT", 8)
    for step in range(100):
        observer.observe(step)
    kept = [step for step, _ in observer.history]
    assert len(kept) <= 8
    assert (kept[0], kept[-1]) == (0, 99)
    assert kept == sorted(kept)


def test_without_prompts_nothing_is_asked(observer):
    empty = FanObserver([], None, observer.critic, observer.tracker, 8)
    empty.observe(1)
    assert observer.critic.asked == observer.tracker.pictures == []


def test_an_answer_longer_than_any_response_is_cut(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = Prompt(0, ({"role": "user", "content": "?"},), "7" * 100_000, "test", (5,))
    observer = FanObserver([prompt], tokenizer, FakeCritic(), FakeTracker(), 8)
    observer.observe(0)
    assert observer.critic.asked[0].response_lens.tolist() == [8, 8]
