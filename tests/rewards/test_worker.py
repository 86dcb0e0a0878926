"""A reward worker, called directly rather than as an actor."""

from __future__ import annotations

from actors.rollouts.reward import RewardWorker, Work
from dvpo_service.config import RewardConfig
from dvpo_service.rewards.combine import combine


def test_each_source_has_its_own_noise() -> None:
    flip = {"kind": "flip", "p": 1.0}
    worker = RewardWorker(RewardConfig.model_validate({"noise": flip, "noise_by_source": {"careful": {}, "odd": flip}}))
    groups = [Work(["2"], "2", [0], source) for source in ("careful", "odd", "any other")]
    results = [{0: found} for found in worker.score(0, groups)]
    noisy = [score for [score] in combine(worker.config, groups, results, training=True)]
    assert [s.reward for s in noisy] == [1.0, 0.0, 0.0]
    assert [s.clean for s in noisy] == [1.0] * 3
    assert [s.reward for [s] in combine(worker.config, groups, results, training=False)] == [1.0] * 3
