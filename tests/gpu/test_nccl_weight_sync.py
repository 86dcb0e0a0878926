"""Over NCCL, in bf16, the engine's log-probs equal the trainer's, as tests/e2e/test_weight_sync.py checks on a CPU.

This needs two GPUs: one for the policy, one for the engine.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from actors.cluster.connect import connected
from actors.cluster.placement import Placement, plan_bundles
from actors.rollouts.engines import EnginePool
from actors.training.policy import PolicyWorker
from actors.weights.sync import SyncedEngines
from actors.weights.transfer import weight_backend
from tests.builders import make_config
from tests.e2e.test_weight_sync import (
    ScrambledPolicy,
    engine_logprobs,
    furthest,
    model_logprobs,
    scrambled_policy,
    sender,
)

pytestmark = [pytest.mark.gpu(2), pytest.mark.e2e]


def test_engine_equals_trainer_over_nccl(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, cluster={"gpus_per_trainer": 1, "gpus_per_engine": 1})
    assert weight_backend(config) == "nccl"
    with connected(config), ExitStack() as stack:
        bundles = [b for b in plan_bundles(config) if b.pool in ("policy", "rollout")]
        placement = Placement(bundles, timeout_s=60)
        policy = scrambled_policy(config, tiny_model, placement)
        engines = EnginePool.spawn(config, str(tiny_model), "nccl", placement)
        stack.callback(engines.shutdown)
        engines.supervisor.start()
        policy.setup().result()
        engines.supervisor.wait_started()
        weights = SyncedEngines(config, engines, "nccl", sender(policy))
        policy.call(ScrambledPolicy.scramble, 0.3)
        weights.push(1)
        policy.call(PolicyWorker.export, str(tmp_path / "changed"))
        assert furthest(engine_logprobs(engines), model_logprobs(tmp_path / "changed")) < 2e-3
