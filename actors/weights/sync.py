"""Engines in step with the policy: its weights go to every engine, with a version, an acknowledgement, a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster.pool import PoolError
from actors.rollouts.engines import EnginePool
from actors.weights.check import EngineCheck
from actors.weights.transfer import EngineClient
from dvpo_service.config import Backend, Config
from dvpo_service.types import Prompt, Sample, Sampling

ANSWER_S = 5.0  # of an engine that is asked whether it is there

# Pushes the policy's weights to a client's engines within a deadline in seconds; returns the causes of those lost.
SendWeights = Callable[[EngineClient, Backend, float], dict[int, str]]


class SyncedEngines:
    """The engine pool together with the policy's weights.

    After ``push(v)`` every engine that serves samples from version ``v`` and from nothing older. An engine that is lost
    on the way is replaced; its successor gets the weights at the next push, or at once when no engine serves: the
    policy holds version ``v`` until the next push. ``check`` compares an engine with the policy when it gets its first
    weights.
    """

    def __init__(
        self,
        config: Config,
        engines: EnginePool,
        backend: Backend,
        send: SendWeights,
        check: EngineCheck | None = None,
    ):
        self.timeout_s = config.rollout.sync_timeout_s
        self.workers_per_engine = config.rollout.tensor_parallel_size
        self.engines, self.backend, self.send, self.check = engines, backend, send, check
        self.version: int | None = None

    def push(self, version: int) -> None:
        """Give every started engine the policy's weights; return when each has acknowledged ``version`` or is lost.

        Raises:
          PoolError: the policy cannot send its weights.
          EngineMismatch: an engine that got its first weights does not compute the policy.
          RestartBudgetExhausted: engines died too often.
        """
        self.version = version
        self.engines.supervisor.advance(version)
        self._push_again()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        run_seed: int,
        step: int,
        check: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """Return samples; see ``EnginePool.generate``."""
        # A caller with ``check`` is not the loop's thread: the policy may be in an update and cannot send its weights.
        revive = None if check else self.revive
        return self.engines.generate(prompts, sampling, run_seed=run_seed, step=step, check=check, revive=revive)

    def revive(self) -> bool:
        """If no engine serves, push the weights again to those that have started; return whether any engine serves.

        Call it from the loop's thread, between two updates.
        """
        supervisor = self.engines.supervisor
        if not supervisor.serving() and supervisor.alive():
            self._push_again()
        return bool(supervisor.serving())

    def _push_again(self) -> None:
        """Push the version of the last push to every engine that has started."""
        assert self.version is not None, "weights are pushed before anything is sampled"
        alive = self.engines.supervisor.alive()
        if not alive:
            return
        client = EngineClient(alive, self.workers_per_engine, self.timeout_s)
        lost = self._send(client, alive)
        for i, cause in lost.items():
            self.engines.supervisor.lost(i, alive[i], cause)
        holding = {i: a for i, a in alive.items() if i not in lost}
        self.engines.set_version(holding, self.version, self.timeout_s)
        if self.check:
            # Again for those that were checked, so that nothing of the check is left in their prefix caches.
            checked = self.check.run(self.engines, self._of_version(holding))
            self.engines.set_version(checked, self.version, self.timeout_s)

    def _send(self, client: EngineClient, alive: dict[int, Any]) -> dict[int, str]:
        """Return the engines lost in a push. The policy has as long again as the engines, to gather its weights.

        Raises:
          PoolError: the policy did not send. An engine that died in the middle of a broadcast holds up the policy and
            every other engine, so the error names those that are gone.
        """
        try:
            return self.send(client, self.backend, 2 * self.timeout_s)
        except PoolError as error:
            gone = missing(alive)
            if not gone:
                raise
            cause = f"{error.cause}; engines that do not answer: {gone}"
            raise PoolError(error.pool, error.method, cause, lost=error.lost) from error

    def _of_version(self, engines: dict[int, Any]) -> dict[int, Any]:
        """Return those of ``engines`` that have acknowledged the version."""
        serving = self.engines.supervisor.serving()
        return {i: a for i, a in engines.items() if i in serving}


def missing(engines: dict[int, Any]) -> str:
    """Return in words which engines do not answer a heartbeat within ``ANSWER_S``, and why; empty if all do."""
    refs = {i: actor.heartbeat.remote() for i, actor in engines.items()}
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=ANSWER_S)
    causes = {}
    for i, ref in refs.items():
        try:
            ray.get(ref, timeout=0)
        except GetTimeoutError:
            causes[i] = f"silent for {ANSWER_S:g} s"
        except RayError as error:
            causes[i] = f"gone ({type(error).__name__})"
    return ", ".join(f"{i} is {cause}" for i, cause in causes.items())
