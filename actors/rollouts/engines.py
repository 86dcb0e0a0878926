"""The pool of rollout engines: prompts in, samples out, in the prompts' order."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from actors.cluster.placement import Placement
from actors.cluster.pool import POLL_S, EngineLost, Pool, PoolError, outcome
from actors.cluster.supervisor import Rhythm, Supervisor, cause_of, restart_budget
from dvpo_service.config import Backend, Config
from dvpo_service.host import stopping
from dvpo_service.registry import engines
from dvpo_service.registry.plugins import is_reference
from dvpo_service.rewards.seeds import sample_seed
from dvpo_service.types import Prompt, Sample, Sampling

log = logging.getLogger(__name__)

# vLLM adds the sample's number to a request's seed; keep the sum within 32 bits.
SEED_RANGE = 2**31
# All shares are submitted at once. Small shares, because an engine that is lost costs its unfinished ones.
SHARES_PER_ENGINE = 8


class Sampler(Protocol):
    """Engines that hold the policy's weights, as the streams and the evaluation use them."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        run_seed: int,
        step: int,
        check: Callable[[], None] | None = None,
    ) -> list[list[Sample]]:
        """See ``EnginePool.generate``."""

    def revive(self) -> bool:
        """If no engine serves, give weights to those that have started; return whether any engine serves now."""


class WarmEngines:
    """Engines that outlive a run and serve the next one in this process, so that the trials of a sweep start sooner.

    A run pushes its own weights before it samples. So the engines fit any run that has the engine settings, the
    architecture and the tokenizer that they were built with.
    """

    def __init__(self) -> None:
        self._pool: EnginePool | None = None
        self._key = ""

    def acquire(
        self, config: Config, model_path: str, backend: Backend, placement: Placement, note: Callable[[str], None]
    ) -> EnginePool:
        """Return the engines that are kept if they fit the run, or else new ones. This object still owns them."""
        key = engine_key(config, model_path, backend)
        if self._pool is None or key != self._key:
            self.drop()
            self._pool, self._key = EnginePool.spawn(config, model_path, backend, placement, note), key
        self._pool.supervisor.report_to(note)
        return self._pool

    def drop(self) -> None:
        """End the engines. Call it after a run that failed, which may have left them in any state."""
        pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()


def engine_key(config: Config, model_path: str, backend: Backend) -> str:
    """Return a key that is equal for runs whose engines are interchangeable.

    Engines with NCCL never are, because they belong to a group of ranks: their key is unique.
    """
    names = (
        "engine",
        "num_engines",
        "tensor_parallel_size",
        "max_num_seqs",
        "enforce_eager",
        "kv_cache_gib",
        "generate_timeout_s",
        "max_staleness",
    )
    rollout = config.rollout
    settings = rollout.model_dump(
        # An engine of the user's own may read any key.
        include=None if is_reference(rollout.engine) else {*names, "gpu_memory_utilization"}
    )
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
class InFlightRequest:
    """A share of the prompts, by position, that engine ``number`` works on until ``deadline`` (monotonic time)."""

    positions: list[int]
    number: int
    actor: Any
    deadline: float


Submit = Callable[[list[int], int, Any], tuple[Any, InFlightRequest]]


class EnginePool(Pool):
    """Supervised engines that share the prompts of a batch evenly.

    When an engine is lost, the prompts that it had not finished are tried again on another; nothing else is repeated.
    """

    def __init__(self, config: Config, supervisor: Supervisor):
        super().__init__(supervisor.name, supervisor.actors, timeout_s=config.rollout.generate_timeout_s)
        self.config, self.supervisor = config, supervisor

    @classmethod
    def spawn(
        cls,
        config: Config,
        model_path: str,
        backend: Backend,
        placement: Placement,
        note: Callable[[str], None] = log.warning,
    ) -> EnginePool:
        """Start ``rollout.num_engines`` actors of the engine that ``rollout.engine`` names."""
        rollout = config.rollout
        actor = ray.remote(engines.load(rollout.engine))

        def make(i: int) -> Any:
            options = actor.options(max_concurrency=1000, **placement.options("rollout", i))
            return options.remote(config, model_path, backend)

        rhythm = Rhythm(rollout.start_timeout_s, rollout.heartbeat_s, rollout.heartbeat_timeout_s)
        budget = restart_budget(config.cluster)
        return cls(config, Supervisor("rollout", rollout.num_engines, make, budget, rhythm, note))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        run_seed: int,
        step: int,
        check: Callable[[], None] | None = None,
        revive: Callable[[], bool] | None = None,
    ) -> list[list[Sample]]:
        """Return ``sampling.n`` samples per prompt. The same seed and step sample the same tokens, on any engine.

        Args:
          check: called while the call waits, by callers outside the loop's thread. It raises when the samples are no
            longer wanted.
          revive: called when no engine serves. It gives weights to engines that have started, and returns whether any
            engine serves now. Without it the call waits until one serves.

        Raises:
          PoolError: no engine can serve a request.
          RestartBudgetExhausted: engines died too often.
        """
        seeds = [sample_seed(run_seed, step, p.index, 0, p.occurrence) % SEED_RANGE for p in prompts]
        asked = [replace(p, answer=None, row={}) for p in prompts]  # columns may be large, and are the rewards' matter

        def submit(positions: list[int], number: int, actor: Any) -> tuple[Any, InFlightRequest]:
            ref = actor.generate.remote([asked[p] for p in positions], sampling, [seeds[p] for p in positions])
            return ref, InFlightRequest(positions, number, actor, time.monotonic() + self.timeout_s)

        in_flight: dict[Any, InFlightRequest] = {}
        shares = split(len(prompts), SHARES_PER_ENGINE * len(self.actors))
        try:
            samples = self._run(shares, submit, in_flight, check or stopping.check, revive)
        finally:
            for ref in in_flight:  # requests are left only if the call ended early
                ray.cancel(ref)
        return [samples[i] for i in range(len(prompts))]

    def _run(
        self,
        waiting: list[list[int]],
        submit: Submit,
        in_flight: dict[Any, InFlightRequest],
        check: Callable[[], None],
        revive: Callable[[], bool] | None,
    ) -> dict[int, list[Sample]]:
        """Return the samples by position. ``in_flight`` holds the open requests by their Ray reference."""
        samples: dict[int, list[Sample]] = {}
        while waiting or in_flight:
            if waiting:
                turn = cycle(self._serving(check, revive).items())
                in_flight |= dict(submit(share, *engine) for share, engine in zip(waiting, turn, strict=False))
                waiting = []
            check()
            done, _ = ray.wait(list(in_flight), timeout=POLL_S)
            for ref in done:
                request = in_flight.pop(ref)
                answer = self.completed(request, outcome(ref))
                if answer is None:
                    waiting.append(request.positions)
                else:
                    samples.update(zip(request.positions, answer, strict=True))
            waiting += self._taken_back(in_flight)
        return samples

    def set_version(self, engines: dict[int, Any], version: int, timeout_s: float) -> None:
        """Have ``engines``, which hold weights ``version`` now, acknowledge it; one that does not is lost."""
        deadline = time.monotonic() + timeout_s
        refs = {i: actor.set_version.remote(version) for i, actor in engines.items()}
        for i, ref in refs.items():
            ready, _ = ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))
            answer = outcome(ref) if ready else f"no answer to set_version within {timeout_s:g} s"
            if answer == version:
                self.supervisor.acknowledged(i, engines[i], version)
            else:
                cause = cause_of(answer) if isinstance(answer, RayError) else str(answer)
                self.supervisor.lost(i, engines[i], cause)

    def shutdown(self) -> None:
        """Let every engine end its own processes, then end its actor."""
        ends = [actor.stop.remote() for actor in self.supervisor.close()]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=30)
        super().shutdown()

    def _serving(self, check: Callable[[], None], revive: Callable[[], bool] | None) -> dict[int, Any]:
        """Return the engines that serve, at least one. If none serves, wait until one does."""
        while not (serving := self.supervisor.serving()):
            check()
            if revive is None or not revive():
                self.supervisor.wait(POLL_S)
        return serving

    def completed(self, request: InFlightRequest, answer: Any) -> list[list[Sample]] | None:
        """Return the samples of an answer, or None when it says that the engine is lost, which is then replaced.

        Raises PoolError if no engine can serve the request.
        """
        if not isinstance(answer, RayError):
            if not isinstance(answer, list) or len(answer) != len(request.positions):
                got = f"{len(answer)} groups" if isinstance(answer, list) else type(answer).__name__
                expected = f"a list of {len(request.positions)} groups of samples"
                raise PoolError(self.name, "generate", f"the engine returned {got}, not {expected}")
            return answer
        if isinstance(answer, RayTaskError) and not isinstance(answer.cause, EngineLost):
            raise PoolError(self.name, "generate", cause_of(answer)) from answer
        self.supervisor.lost(request.number, request.actor, cause_of(answer))
        return None

    def _taken_back(self, in_flight: dict[Any, InFlightRequest]) -> list[list[int]]:
        """Remove the requests of engines that were lost, or that miss their deadline now; return their shares."""
        back = []
        for ref, request in list(in_flight.items()):
            if time.monotonic() > request.deadline:
                cause = f"no answer to generate within {self.timeout_s:g} s"
                self.supervisor.lost(request.number, request.actor, cause)
            if not self.supervisor.is_current(request.number, request.actor):
                del in_flight[ref]
                back.append(request.positions)
        return back


def split(count: int, parts: int) -> list[list[int]]:
    """Return the positions 0 .. count-1 in at most ``parts`` shares, dealt out in turn."""
    return [list(range(i, count, parts)) for i in range(min(count, parts))]
