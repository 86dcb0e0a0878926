"""The pool of rollout engines: prompts in, samples out, in the prompts' order."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import ray

from actors.placement import Placement
from actors.pool import Call, Pool, PoolError
from actors.rollout import RolloutEngine, Sampling
from actors.weight_transfer import Backend
from dvpo_service.config import Config
from dvpo_service.rewards.noise import sample_seed
from dvpo_service.types import Prompt, Sample

log = logging.getLogger(__name__)

# vLLM adds the sample's number to a request's seed; keep the sum within 32 bits.
SEED_RANGE = 2**31


class EnginePool(Pool):
    """vLLM engines that share the prompts of a batch evenly."""

    @classmethod
    def spawn(cls, config: Config, model_path: str, backend: Backend, placement: Placement) -> EnginePool:
        actor = ray.remote(RolloutEngine)
        return cls(
            "rollout",
            [
                actor.options(max_concurrency=1000, **placement.options("rollout", i)).remote(
                    config, model_path, backend
                )
                for i in range(config.rollout.num_engines)
            ],
            timeout_s=config.rollout.generate_timeout_s,
        )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, run_seed: int, step: int
    ) -> list[list[Sample]]:
        """``sampling.n`` samples per prompt. The same seed and step sample the same tokens."""
        seeds = [sample_seed(run_seed, step, p.index, 0) % SEED_RANGE for p in prompts]
        count = len(self.actors)
        refs = [
            actor.generate.remote(list(prompts[i::count]), sampling, seeds[i::count])
            for i, actor in enumerate(self.actors)
        ]
        shares = Call(self.name, "generate", refs, self.timeout_s).result()
        return [shares[i % count][i // count] for i in range(len(prompts))]

    def shutdown(self) -> None:
        """Let every engine end its own processes before its actor goes."""
        try:
            self.call("stop", timeout_s=30)
        except PoolError as error:
            log.warning("an engine did not end by itself and is killed: %s", error)
        super().shutdown()
