"""Weights from the policy to every engine: versioned, acknowledged, with a deadline."""

from __future__ import annotations

from actors.engines import EnginePool
from actors.pool import RankPool
from actors.weight_transfer import Backend, EngineClient
from dvpo_service.config import Config


class WeightSync:
    """After ``push(v)`` every engine that serves samples from version ``v`` and from nothing older.

    An engine that is lost on the way is replaced; its successor gets the weights at the next push, or
    at once when no engine serves: the policy holds version ``v`` until the next push.
    """

    def __init__(self, config: Config, policy: RankPool, engines: EnginePool, backend: Backend):
        self.timeout_s, self.workers = config.rollout.sync_timeout_s, config.rollout.tensor_parallel_size
        self.policy, self.engines, self.backend = policy, engines, backend
        self.version: int | None = None
        engines.push_again = self.push_again

    def push(self, version: int) -> None:
        """Raises PoolError when the policy cannot send, RestartsSpent when engines die too often."""
        self.version = version
        self.engines.supervisor.advance(version)
        self.push_again()

    def push_again(self) -> None:
        """The version of the last push, to every engine that has started."""
        assert self.version is not None, "weights are pushed before anything is sampled"
        alive = self.engines.supervisor.alive()
        if not alive:
            return
        client = EngineClient(alive, self.workers, self.timeout_s)
        # Every call of the client has its own deadline: this one is for the whole of them.
        lost = self.policy.call("send_weights", client, self.backend, timeout_s=4 * self.timeout_s)[0]
        for i, cause in lost.items():
            self.engines.supervisor.lost(i, alive[i], cause)
        self.engines.set_version({i: a for i, a in alive.items() if i not in lost}, self.version, self.timeout_s)
