"""Reward workers in real processes: a call that hangs, dies or raises costs only its own samples."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.cluster.connect import connected
from actors.cluster.placement import Placement, plan_bundles
from actors.cluster.pool import PoolError
from actors.rollouts.reward import Work
from actors.rollouts.reward_pool import RewardPool
from dvpo_service.config import Config
from dvpo_service.config.reward_model import RewardModelConfig
from dvpo_service.rewards.model import ModelPart
from tests.builders import make_config
from tests.rewards.small_models import save_reward_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model", "decoder")


@pytest.fixture(scope="module")
def pool(tiny_model: Path, model: Path) -> Iterator[RewardPool]:
    config: Config = make_config(
        tiny_model,
        reward={
            "rewards": [
                {"function": "tests.actors.rollouts.bad_rewards:troublesome"},
                {"function": "exact_match", "weight": 0},
                {"model": {"path": str(model)}, "weight": 0},
            ],
            "num_workers": 2,
            "timeout_s": 8,
            "max_memory_gib": 1,
            "heartbeat_s": 0.2,
            "heartbeat_timeout_s": 3,
        },
    )
    with connected(config):
        pool = RewardPool(config.reward, Placement(plan_bundles(config), timeout_s=60))
        pool.wait_ready(60)
        yield pool
        pool.shutdown()


def test_good_groups_are_scored_whatever_happens_beside_them(pool: RewardPool) -> None:
    groups = [Work(["ok", "no"], "ok", [1, 2]) for _ in range(6)]
    groups[1] = Work(["hang"], "ok", [1])
    groups[3] = Work(["die"], "ok", [1])  # on the same worker as the group that hangs
    groups[2] = Work(["raise", "ok"], "ok", [1, 2])
    noted: list[tuple[str, float]] = []
    pool.note = lambda text: noted.append((text, time.perf_counter()))
    started = time.perf_counter()
    scores = pool.score(groups, noisy=False)
    assert time.perf_counter() - started < 90
    noticed = next(at - started for text, at in noted if "no answer" in text)
    assert noticed < 2 * pool.config.timeout_s, "at its own deadline, not at that of its worker's whole share"
    for i in (0, 4, 5):
        assert [s.reward for s in scores[i]] == [1.0, 0.0], i
    assert "no answer within 8 s" in (scores[1][0].error or "")
    assert "process died" in (scores[3][0].error or "")
    assert "ZeroDivisionError" in (scores[2][0].error or "")
    assert scores[2][1].reward == 1.0
    assert scores[1][0].reward != scores[1][0].reward, "a failed sample has no reward, not 0"
    raw = {p.name: p.raw for p in scores[1][0].parts}
    assert (math.isnan(raw["troublesome"]), raw["exact_match"]) == (True, 0.0), "the other reward has its own deadline"


@pytest.mark.parametrize(
    ("signum", "why"), [(signal.SIGKILL, "the process died"), (signal.SIGSTOP, "no answer within 3 s")]
)
def test_a_worker_lost_while_idle_is_replaced_before_it_is_needed(pool: RewardPool, signum: int, why: str) -> None:
    assert pool.score([Work(["ok"], "ok", [1])] * 2, noisy=False), "both are up"
    noted: list[str] = []
    pool.note = noted.append
    before = pool.restarts
    os.kill(ray.get(pool.workers[1].__ray_call__.remote(lambda _: os.getpid()), timeout=30), signum)
    deadline = time.monotonic() + 15
    while pool.restarts == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert noted[0].startswith(f"reward worker 1: {why}")
    assert [g[0].reward for g in pool.score([Work(["ok"], "ok", [1])] * 2, noisy=False)] == [1.0, 1.0]
    assert pool.restarts == before + 1


def test_a_reward_model_has_a_worker_of_its_own_that_is_replaced_like_others(pool: RewardPool, model: Path) -> None:
    groups = [Work(["4", "five"], "4", [1, 2]), Work(["6"], "6", [1])]
    expected = [r.value for group in ModelPart(RewardModelConfig(path=str(model))).score(groups) for r in group]

    def raw() -> list[float]:
        return [p.raw for group in pool.score(groups, noisy=True) for s in group for p in s.parts if p.name == "model"]

    assert raw() == pytest.approx(expected, abs=1e-5)
    before = pool.restarts
    os.kill(ray.get(pool.workers[2].__ray_call__.remote(lambda _: os.getpid()), timeout=30), signal.SIGKILL)
    assert raw() == pytest.approx(expected, abs=1e-5)
    assert pool.restarts > before


def test_the_pool_works_on_after_that(pool: RewardPool) -> None:
    assert [s.reward for s in pool.score([Work(["ok"], "ok", [1])], noisy=False)[0]] == [1.0]


def test_a_function_that_eats_memory_costs_its_sample_only(pool: RewardPool) -> None:
    before = pool.restarts
    [[eaten, good]] = pool.score([Work(["eat", "ok"], "ok", [1, 2])], noisy=False)
    assert "MemoryError" in (eaten.error or "")
    assert good.reward == 1.0
    assert pool.restarts == before, "the worker lives on"


def test_a_function_that_a_node_does_not_have_is_found_before_training(pool: RewardPool) -> None:
    """This test is the last of the file: it shuts the pool down and uses its placement."""
    pool.shutdown()
    missing = RewardPool(pool.config.model_copy(update={"function": "not_here:score", "rewards": None}), pool.placement)
    with pytest.raises(PoolError, match=r"'not_here' cannot be imported.*--working-dir"):
        missing.wait_ready(60)
    missing.shutdown()
