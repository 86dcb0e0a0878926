"""The same exactness over NCCL, in bf16. Needs two GPUs: one for the policy, one for the engine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from actors.cluster import connected
from actors.engines import EnginePool
from actors.placement import Placement, plan_bundles
from actors.pool import RankPool
from actors.weight_sync import WeightSync
from actors.weight_transfer import weight_backend
from tests.builders import make_config
from tests.e2e.test_weight_sync import ScrambledPolicy, engine_logprobs, furthest, model_logprobs

pytestmark = [pytest.mark.gpu(2), pytest.mark.e2e]


def test_engine_equals_trainer_over_nccl(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, cluster={"gpus_per_trainer": 1, "gpus_per_engine": 1})
    assert weight_backend(config) == "nccl"
    with connected(config), ExitStack() as stack:
        bundles = [b for b in plan_bundles(config) if b.pool in ("policy", "rollout")]
        placement = Placement(bundles, timeout_s=60)
        policy = RankPool("policy", 1, placement, timeout_s=300)
        engines = EnginePool.spawn(config, str(tiny_model), "nccl", placement)
        stack.callback(engines.shutdown)
        engines.supervisor.start()
        policy.setup(ScrambledPolicy, config, str(tiny_model)).result()
        engines.supervisor.wait_started()
        weights = WeightSync(config, policy, engines, "nccl")
        policy.call("scramble", 0.3)
        weights.push(1)
        policy.call("export", str(tmp_path / "changed"))
        assert furthest(engine_logprobs(engines), model_logprobs(tmp_path / "changed")) < 2e-3
