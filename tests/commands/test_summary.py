"""The summary is valid JSON, and says in words what could not be measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.rollouts.evaluation import HeldOutEvaluator
from dvpo_service.commands.summary import critic_explains, summarize
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.loop import TrainState
from dvpo_service.runs.directory import RunDir
from dvpo_service.types import Prompt, Score

TRACKER: Any = SimpleNamespace(advice=["a warning"], tracking_uri=None, run_id=None)


def test_what_could_not_be_scored_is_null_and_said(config: Config, tmp_path: Path) -> None:
    after = {"eval/id/accuracy": math.nan, "eval/id/greedy": math.nan, "eval/ood/accuracy": 0.5, "eval/ood/graded": 1.0}
    state = TrainState(step=3, before={"eval/id/accuracy": 0.25}, after=after)
    summarize(config, state, RunDir(tmp_path), TRACKER, 1.0)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: f"bare {name}")
    assert summary["held_out_before"] == {"id": 0.25}
    assert summary["held_out_after"] == {"id": None, "ood": 0.5}
    assert summary["held_out_greedy_after"] == {"id": None}
    assert summary["graded"] == ["ood"]
    assert summary["warnings"][0] == "a warning"
    assert "held-out split id: no response could be scored at step 3" in summary["warnings"][1]
    assert len(summary["warnings"]) == 2


def evaluated(config: Config, *clean: float | None) -> dict[str, float]:
    """Return the metrics of an evaluation of one prompt whose samples have these rewards; None stands for a failure."""
    rows = (Prompt(0, ({"role": "user", "content": "?"},), "1", "t", (5,)),)
    scores = [Score(c, c) if c is not None else Score(math.nan, math.nan, "NameError") for c in clean]
    evaluator = HeldOutEvaluator(config, {"val": Dataset("val", rows, ("",))}, None, None)  # type: ignore[arg-type]
    evaluator._score = lambda prompts, sampling: [scores]  # type: ignore[method-assign]
    return evaluator.run(0)


def test_grades_are_told_from_right_and_wrong(config: Config) -> None:
    assert evaluated(config, 0.0, 1.0) == {"eval/val/accuracy": 0.5, "eval/val/greedy": 0.5}
    assert evaluated(config, 0.5, 1.0, None)["eval/val/graded"] == 0.5
    assert "eval/val/graded" not in evaluated(config, None)
    assert math.isnan(evaluated(config, None)["eval/val/accuracy"])


def test_what_the_critic_explains_is_a_mean_over_the_last_fifth() -> None:
    between, end = "critic/explained_variance_between", "critic/explained_variance_end"
    rows = [{"step": k, between: 0.1 * k, end: 0.5 if k == 9 else math.nan} for k in range(1, 11)]
    assert critic_explains(rows) == {"between_prompts": 0.95, "within_a_prompt": 0.5}
    assert critic_explains([{"step": 0}, {"step": 1, end: None}]) == {}, "null stands for not finite in the file"
    assert critic_explains([{"step": 1, end: 0.0}]) == {"within_a_prompt": 0.0}
    assert critic_explains([]) == {}
