"""The pool of rollout engines: prompts in, samples out, in the prompts' order."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.placement import Placement
from actors.pool import POLL_S, Pool, PoolError, outcome
from actors.rollout import EngineLost, RolloutEngine, Sampling
from actors.supervisor import Rhythm, Supervisor, cause_of, restart_budget
from actors.weight_transfer import Backend
from dvpo_service import stopping
from dvpo_service.config import Config
from dvpo_service.rewards.noise import sample_seed
from dvpo_service.types import Prompt, Sample

# vLLM adds the sample's number to a request's seed; keep the sum within 32 bits.
SEED_RANGE = 2**31
# All are handed out at once; what is finished survives its engine.
SHARES_PER_ENGINE = 8


class WarmEngines:
    """Engines that outlive a run, for the next one in this process: the trials of a sweep start sooner.

    A run pushes its own weights before it samples, so engines fit any run whose engine settings,
    architecture and tokenizer are those that they were built with.
    """

    def __init__(self) -> None:
        self._pool: EnginePool | None = None
        self._key = ""

    def lend(self, config: Config, model_path: str, backend: Backend, placement: Placement) -> EnginePool:
        """The engines kept, or new ones; they stay this object's."""
        key = engine_key(config, model_path, backend)
        if self._pool is None or key != self._key:
            self.drop()
            self._pool, self._key = EnginePool.spawn(config, model_path, backend, placement), key
        return self._pool

    def drop(self) -> None:
        """End the engines, as after a run that failed: who knows in what state it left them."""
        pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()


def engine_key(config: Config, model_path: str, backend: Backend) -> str:
    """Equal for runs whose engines are interchangeable. NCCL engines never are: they belong to a group of ranks."""
    names = (
        "num_engines",
        "tensor_parallel_size",
        "max_num_seqs",
        "enforce_eager",
        "kv_cache_gib",
        "generate_timeout_s",
        "max_staleness",
    )
    settings = config.rollout.model_dump(include={*names, "gpu_memory_utilization"})
    parts = [str(settings), config.model.dtype, str(config.max_model_len), backend]
    folder = Path(model_path)
    if backend != "safetensors" or not folder.is_dir():
        return uuid.uuid4().hex
    digest = hashlib.sha256("|".join(parts).encode())
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            digest.update((folder / file).read_bytes())
    return digest.hexdigest()


@dataclass
class Flight:
    """A share of prompts (their positions) that engine ``number`` works on."""

    positions: list[int]
    number: int
    actor: Any
    deadline: float


class EnginePool(Pool):
    """vLLM engines that share the prompts of a batch evenly, supervised: one that is lost costs the
    prompts it had not finished a second try elsewhere, and nothing else."""

    def __init__(self, config: Config, supervisor: Supervisor):
        super().__init__(supervisor.name, supervisor.actors, timeout_s=config.rollout.generate_timeout_s)
        self.config, self.supervisor = config, supervisor
        self.push_again: Callable[[], None] = lambda: None  # weights to engines that have none, when none serves

    @classmethod
    def spawn(cls, config: Config, model_path: str, backend: Backend, placement: Placement) -> EnginePool:
        actor, rollout = ray.remote(RolloutEngine), config.rollout

        def make(i: int) -> Any:
            options = actor.options(max_concurrency=1000, **placement.options("rollout", i))
            return options.remote(config, model_path, backend)

        rhythm = Rhythm(rollout.start_timeout_s, rollout.heartbeat_s, rollout.heartbeat_timeout_s)
        budget = restart_budget(config.cluster)
        return cls(config, Supervisor("rollout", rollout.num_engines, make, budget, rhythm))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        run_seed: int,
        step: int,
        check: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """``sampling.n`` samples per prompt. The same seed and step sample the same tokens, on any engine.

        ``check`` is for callers in other threads than the loop's: it raises when the samples are no longer wanted.
        They wait for the loop's ``revive`` where no engine serves, since the policy may be in the middle of an update.
        """
        seeds = [sample_seed(run_seed, step, p.index, 0) % SEED_RANGE for p in prompts]

        def depart(positions: list[int], number: int, actor: Any) -> tuple[Any, Flight]:
            ref = actor.generate.remote([prompts[p] for p in positions], sampling, [seeds[p] for p in positions])
            return ref, Flight(positions, number, actor, time.monotonic() + self.timeout_s)

        flights: dict[Any, Flight] = {}
        try:
            samples = self._fly(cut(len(prompts), SHARES_PER_ENGINE * len(self.actors)), depart, flights, check)
        finally:
            for ref in flights:  # of a call that ended early
                ray.cancel(ref)
        return [samples[i] for i in range(len(prompts))]

    def _fly(
        self,
        waiting: list[list[int]],
        depart: Callable[[list[int], int, Any], tuple[Any, Flight]],
        flights: dict[Any, Flight],
        check: Callable[[], None] | None,
    ) -> dict[int, list[Sample]]:
        """Samples by position. ``flights`` are those under way."""
        samples: dict[int, list[Sample]] = {}
        while waiting or flights:
            if waiting:
                turn = cycle(self._serving(check).items())
                flights |= dict(depart(p, *engine) for p, engine in zip(waiting, turn, strict=False))
                waiting = []
            (check or stopping.check)()
            done, _ = ray.wait(list(flights), timeout=POLL_S)
            for ref in done:
                flight = flights.pop(ref)
                found = self._landed(flight, outcome(ref))
                if found is None:
                    waiting.append(flight.positions)
                else:
                    samples.update(zip(flight.positions, found, strict=True))
            waiting += self._recalled(flights)
        return samples

    def set_version(self, engines: dict[int, Any], version: int, timeout_s: float) -> None:
        """Have ``engines``, which hold weights ``version`` now, say so; then they serve."""
        deadline = time.monotonic() + timeout_s
        refs = {i: actor.set_version.remote(version) for i, actor in engines.items()}
        for i, ref in refs.items():
            ready, _ = ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))
            found = outcome(ref) if ready else f"no answer to set_version within {timeout_s:g} s"
            if found == version:
                self.supervisor.acknowledged(i, engines[i], version)
            else:
                cause = cause_of(found) if isinstance(found, RayError) else str(found)
                self.supervisor.lost(i, engines[i], cause)

    def shutdown(self) -> None:
        """Let every engine end its own processes before its actor goes."""
        ends = [actor.stop.remote() for actor in self.supervisor.close()]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=30)
        super().shutdown()

    def revive(self) -> bool:
        """Weights to the engines where none serves; whether any does. For the loop's thread, between two updates."""
        if not self.supervisor.serving() and self.supervisor.alive():
            self.push_again()
        return bool(self.supervisor.serving())

    def _serving(self, check: Callable[[], None] | None) -> dict[int, Any]:
        """At least one engine that serves; waits for a replacement where all are lost."""
        while not (serving := self.supervisor.serving()):
            (check or stopping.check)()
            if check or not self.revive():
                self.supervisor.wait(POLL_S)
        return serving

    def _landed(self, flight: Flight, found: Any) -> list[list[Sample]] | None:
        """The samples; None when the engine was lost. Raises PoolError for a request that no engine can serve."""
        if not isinstance(found, RayError):
            return found
        if isinstance(found, RayTaskError) and not isinstance(found.cause, EngineLost):
            raise PoolError(self.name, "generate", cause_of(found)) from found
        self.supervisor.lost(flight.number, flight.actor, cause_of(found))
        return None

    def _recalled(self, flights: dict[Any, Flight]) -> list[list[int]]:
        """Take back the shares of engines that were lost meanwhile, or that miss their deadline now."""
        back = []
        for ref, flight in list(flights.items()):
            if time.monotonic() > flight.deadline:
                self.supervisor.lost(flight.number, flight.actor, f"no answer to generate within {self.timeout_s:g} s")
            if not self.supervisor.is_current(flight.number, flight.actor):
                del flights[ref]
                back.append(flight.positions)
        return back


def cut(count: int, parts: int) -> list[list[int]]:
    """Positions 0 .. count-1 in at most ``parts`` shares, dealt in turn."""
    return [list(range(i, count, parts)) for i in range(min(count, parts))]
