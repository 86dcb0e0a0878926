"""A reward worker, called directly rather than as an actor."""

from __future__ import annotations

from actors.rollouts.reward import RewardWorker, Work
from dvpo_service.config import RewardConfig


def test_each_source_has_its_own_noise() -> None:
    flip = {"kind": "flip", "p": 1.0}
    worker = RewardWorker(RewardConfig.model_validate({"noise": flip, "noise_by_source": {"careful": {}, "odd": flip}}))
    groups = [Work(["2"], "2", [0], source) for source in ("careful", "odd", "any other")]
    noisy = [score for [score] in worker.score(groups, noisy=True)]
    assert [s.reward for s in noisy] == [1.0, 0.0, 0.0]
    assert [s.clean for s in noisy] == [1.0] * 3
    assert [s.reward for [s] in worker.score(groups, noisy=False)] == [1.0] * 3
