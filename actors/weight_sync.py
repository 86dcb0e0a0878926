"""Weights from the policy to every engine: versioned, acknowledged, with a deadline."""

from __future__ import annotations

from actors.engines import EnginePool
from actors.pool import PoolError, RankPool
from actors.weight_transfer import Backend, EngineClient
from dvpo_service.config import Config


class WeightSync:
    """After ``push(v)`` returns, every engine samples from version ``v`` and from nothing older."""

    def __init__(self, config: Config, policy: RankPool, engines: EnginePool, backend: Backend):
        self.timeout_s = config.rollout.sync_timeout_s
        self.policy, self.engines = policy, engines
        client = EngineClient(engines.actors, config.rollout.tensor_parallel_size, self.timeout_s)
        policy.call("connect_engines", client, backend, timeout_s=self.timeout_s)

    def push(self, version: int) -> None:
        self.policy.call("send_weights", timeout_s=self.timeout_s)
        acknowledged = self.engines.call("set_version", version, timeout_s=self.timeout_s)
        if any(v != version for v in acknowledged):
            raise PoolError("rollout", "set_version", f"engines hold versions {acknowledged}, not {version}")
