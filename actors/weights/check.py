"""New engines held against the policy, before anything is sampled for training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from torch import Tensor

from actors.cluster.pool import outcome
from actors.rollouts.engines import EnginePool, InFlightRequest
from dvpo_service.algo.diagnostics import rollout_kl_metrics, rollout_kl_sums
from dvpo_service.config import Config
from dvpo_service.data.collate import collate
from dvpo_service.errors import engine_mismatch
from dvpo_service.types import Prompt, Rollouts, Sample, Sampling, Score

PROMPTS = 4
TOKENS = 8
SEED = 1

# Returns the policy's log-probs [B, T] of the responses in a batch.
ScorePolicy = Callable[[Rollouts], Tensor]


class EngineCheck:
    """Compares an engine with the policy whose weights it was given.

    Each engine that joins samples a few tokens for the same few prompts, without truncation, and the policy scores
    them. An engine that computes another model is found here whatever the cause: weights that were not loaded, or an
    architecture that vLLM computes otherwise than transformers.

    Args:
      prompts: the prompts of which the first few are used.
      score: the policy.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt], score: ScorePolicy):
        self.prompts, self.score = list(prompts[:PROMPTS]), score
        self.bound, self.timeout_s = config.precision_kl, config.rollout.sync_timeout_s
        tokens = min(TOKENS, config.rollout.max_new_tokens)
        self.sampling = Sampling(
            n=1, temperature=config.rollout.temperature, top_p=1.0, top_k=-1, max_new_tokens=tokens
        )
        self._passed: set[Any] = set()

    def run(self, pool: EnginePool, engines: dict[int, Any]) -> dict[int, Any]:
        """Check those of ``engines`` that are new, and return these. One that does not answer in time is lost.

        Raises:
          EngineMismatch: an engine's log-probs are too far from the policy's.
          PoolError: an engine cannot serve the prompts.
        """
        new = {i: actor for i, actor in engines.items() if actor._actor_id not in self._passed}
        deadline = time.monotonic() + self.timeout_s
        seeds = [SEED] * len(self.prompts)
        refs = {i: actor.generate.remote(self.prompts, self.sampling, seeds) for i, actor in new.items()}
        for i, ref in refs.items():
            ready, _ = ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                pool.supervisor.lost(i, new.pop(i), f"no answer to its first prompts within {self.timeout_s:g} s")
                continue
            # An engine that is lost is replaced; prompts that no engine can serve end the run, as in any generation.
            samples = pool.completed(InFlightRequest(list(range(len(seeds))), i, new[i], deadline), outcome(ref))
            if samples is None:
                del new[i]
                continue
            self._compare(i, samples)
            self._passed.add(new[i]._actor_id)
        return new

    def _compare(self, number: int, groups: list[list[Sample]]) -> None:
        rollouts = collate(self.prompts, groups, [[Score(0.0, 0.0)]] * len(groups))
        if rollouts.num_tokens == 0:
            return  # an engine of the user's own may end a response at once
        sums = rollout_kl_sums(self.score(rollouts), rollouts.rollout_logprobs, rollouts.response_mask)
        kl = rollout_kl_metrics(sums)["policy/rollout_kl"]
        if not kl <= self.bound:
            raise engine_mismatch(f"engine {number} after its first weights", kl, self.bound)
