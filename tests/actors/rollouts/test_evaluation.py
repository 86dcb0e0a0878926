"""What an evaluation measures, with engines and rewards in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from actors.rollouts.evaluation import HeldOutEvaluator
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.types import Prompt, Sample, Sampling, Score
from tests.builders import make_config


class Engines:
    """Engines whose samples are their own number as text; greedy samples are the text "greedy"."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, prompts: list[Prompt], sampling: Sampling, *, run_seed: int, step: int) -> list[list[Sample]]:
        self.batches.append(len(prompts) * sampling.n)
        text = "greedy" if sampling.temperature == 0 else "{}"
        return [
            [Sample(p.index, j, (1,), (0.0,), text.format(j), "stop", 0) for j in range(sampling.n)] for p in prompts
        ]


class Rewards:
    """Sample 0 is right and sample 1 cannot be scored. Greedy samples are right where the prompt's answer is "easy"."""

    def score(self, groups: list[Any], *, noisy: bool) -> list[list[Score]]:
        assert not noisy
        return [[self._one(text, work.answer) for text in work.responses] for work in groups]

    def _one(self, text: str, answer: str) -> Score:
        if text == "1":
            return Score(math.nan, math.nan, "it raised")
        right = float(text == "0" or (text == "greedy" and answer == "easy"))
        return Score(math.nan, right)


@pytest.fixture
def held_out(tiny_model: Path) -> HeldOutEvaluator:
    config: Config = make_config(tiny_model, rollout={"max_num_seqs": 8}, trainer={"eval_samples": 3})
    prompts = tuple(
        Prompt(i, ({"role": "user", "content": "?"},), "easy" if i < 4 else "hard", f"source-{i % 2}", (4,))
        for i in range(5)
    )
    splits = {"id": Dataset("id", prompts, ("",) * 5), "ood": Dataset("ood", prompts[:1], ("",))}
    return HeldOutEvaluator(config, splits, Engines(), Rewards())  # type: ignore[arg-type]


def test_every_prompt_is_sampled_n_times_and_greedily(held_out: HeldOutEvaluator) -> None:
    done: list[int] = []
    results = held_out.measure(4, done.append)
    assert [(p.split, p.source) for p in results] == [("id", f"source-{i % 2}") for i in range(5)] + [
        ("ood", "source-0")
    ]
    assert all((p.samples, p.failed) == ((1.0, 0.0, 0.0), 1) for p in results)
    assert [p.greedy for p in results] == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    assert done == [2, 4, 5, 6], "as many at a time as the engine runs side by side"
    assert max(held_out.engines.batches) == 8  # type: ignore[attr-defined]


def test_what_training_reports(held_out: HeldOutEvaluator) -> None:
    assert held_out.run(0) == {
        "eval/id/accuracy": 0.5,
        "eval/id/greedy": 0.8,
        "eval/ood/accuracy": 0.5,
        "eval/ood/greedy": 1.0,
    }
