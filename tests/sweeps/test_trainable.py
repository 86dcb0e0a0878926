"""A trial that fails is known as failed, to Tune and in its record."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.config import load_config
from dvpo_service.errors import RewardsFailed
from tune_sweeps import trainable
from tune_sweeps.grid import GRIDS
from tune_sweeps.plan import Job
from tune_sweeps.records import Sweep, TrialState, trial_folder
from tune_sweeps.run import _default_slots


def test_an_error_that_the_user_can_fix_is_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise RewardsFailed("no response of step 3 could be scored")

    monkeypatch.setattr(trainable, "train", train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = Job.of(Sweep(tmp_path, GRIDS["heads"], "demo", [], [0], None, None), {0: None})
    for attempt in (1, 2):  # Tune's next attempt, or that of --resume
        with pytest.raises(RewardsFailed):
            trainable.run_trial({"trial": ("n_heads=5", 0)}, job)
        state = TrialState.load(tmp_path / "trials" / trial_folder("n_heads=5", 0))
        assert state is not None
        assert (state.status, state.attempts) == ("failed", attempt)
        assert "step 3 could be scored" in state.error


def test_a_trial_in_one_process_takes_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, one = (load_config("demo", [f"cluster.in_process={together}"]) for together in ("false", "true"))
    assert [b["CPU"] for b in trainable.trial_resources(one).bundles] == [trainable.OWN_CPU, 1.0]
    assert len(trainable.trial_resources(apart).bundles) == 5, "the loop, policy, critic, engine, rewards"
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (_default_slots(apart), _default_slots(one)) == (3, 6)
