"""``rollout``: how responses are sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dvpo_service.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from dvpo_service.registry import engines

Backend = Literal["safetensors", "nccl", "ipc"]  # how weights are sent to the engines


class RolloutConfig(Section):
    """How responses are sampled.

    Attributes:
      engine: vllm, or ``module:name`` of your own (docs/extending.md).
      n: responses per prompt.
      max_staleness: how many updates the weights that sample a token may be behind the update that uses it. Batches are
        generated up to that many steps ahead; 0 is on-policy, with the stages one after the other.
      max_kl: bound on ``policy/rollout_kl`` of fresh tokens; above it the run stops before it trains on the batch. The
        default is 1e-4 in float32 and 0.1 in bfloat16.
      importance_correction: weighs each token by trainer / engine probability. ``truncated`` caps the weight at
        ``importance_cap``; ``masked`` sets it to 0 above the cap and below ``importance_floor``; ``auto`` is
        ``truncated`` where ``max_staleness`` is above 0.
      dynamic_sampling: groups whose rewards are all equal teach nothing, so more prompts are drawn in their place, up
        to ``max_draws`` batches.
      heartbeat_s: how often an engine is asked whether it is alive; one silent for ``heartbeat_timeout_s`` is replaced.
      reuse_gib: memory for scored rollouts, which are used again when steps are repeated after a fault.
    """

    engine: Annotated[str, AfterValidator(engines.check_name)] = "vllm"
    num_engines: Positive = 1
    tensor_parallel_size: Positive = 1
    prompts_per_step: Positive = 32
    n: Positive = 8
    temperature: PositiveFloat = 1.0
    top_p: Fraction = 1.0
    top_k: int = -1
    max_new_tokens: Positive = 16
    max_staleness: NonNegative = 0
    max_num_seqs: Positive = 256
    enforce_eager: bool = False
    kv_cache_gib: PositiveFloat = 1.0
    gpu_memory_utilization: Fraction = 0.5
    weight_transfer: Literal["auto"] | Backend = "auto"
    max_kl: PositiveFloat | None = None
    importance_correction: Literal["auto", "none", "truncated", "masked"] = "auto"
    importance_cap: PositiveFloat = 2.0
    importance_floor: NonNegativeFloat = 0.0
    dynamic_sampling: bool = False
    max_draws: Annotated[int, Field(ge=2)] = 4
    start_timeout_s: PositiveFloat = 600.0
    generate_timeout_s: PositiveFloat = 600.0
    sync_timeout_s: PositiveFloat = 300.0
    heartbeat_s: PositiveFloat = 1.0
    heartbeat_timeout_s: PositiveFloat = 60.0
    reuse_gib: NonNegativeFloat = 0.5

    @property
    def correction(self) -> Literal["none", "truncated", "masked"]:
        """The correction with ``auto`` resolved: ``truncated`` for stale tokens, ``none`` for on-policy ones."""
        if self.importance_correction != "auto":
            return self.importance_correction
        return "truncated" if self.max_staleness else "none"
