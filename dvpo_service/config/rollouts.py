"""``rollout`` and ``reward``: how responses are sampled and scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dvpo_service.algo.choices import NoiseKind
from dvpo_service.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from dvpo_service.registry import engines

Backend = Literal["safetensors", "nccl", "ipc"]  # of weight transfer


class RolloutConfig(Section):
    """``engine``: vllm, or ``module:name`` of your own (docs/extending.md).

    ``heartbeat_s``: how often an engine is asked; one silent for ``heartbeat_timeout_s`` is replaced. ``reuse_gib``:
    memory for scored rollouts, which steps done again after a fault take from there. ``dynamic_sampling``: groups
    whose rewards are all equal teach nothing; draw more prompts in their place, up to ``max_draws`` batches.
    ``max_staleness``: a batch is generated while up to that many updates before its own are made, and no token of it is
    from older weights; 0 is on-policy, the stages one after the other. ``importance_correction`` weighs tokens by
    trainer / engine probability: ``truncated`` at ``importance_cap``, or ``masked`` (0) above it and below
    ``importance_floor``; ``auto`` is ``truncated`` where ``max_staleness`` is above 0.
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
        """``auto``: stale tokens are weighed, fresh ones are taken as they are."""
        if self.importance_correction != "auto":
            return self.importance_correction
        return "truncated" if self.max_staleness else "none"


class NoiseConfig(Section):
    """``flip`` turns an outcome r in [0, 1] into 1 - r with probability ``p``; ``gaussian`` adds
    N(0, ``sd``); ``majority_vote`` scores against the group's most frequent answer."""

    kind: NoiseKind = "none"
    p: Probability = 0.0
    sd: NonNegativeFloat = 0.0


class RewardConfig(Section):
    """``function``: exact_match, gsm8k, math_verify or ``module:function``. ``overlong_buffer``: over the
    last that many tokens before the length limit the reward falls by up to ``overlong_penalty``; 0 is off.
    A call that takes more than ``max_memory_gib`` beyond what its worker holds is a failed sample; null: no bound.
    A worker with nothing to do is asked every ``heartbeat_s`` whether it is there. ``noise_by_source`` replaces
    ``noise`` for the prompts of a ``data_source``: graders are not all equally reliable."""

    function: str = "exact_match"
    num_workers: Positive = 1
    timeout_s: PositiveFloat = 30.0
    start_timeout_s: PositiveFloat = 120.0
    heartbeat_s: PositiveFloat = 5.0
    heartbeat_timeout_s: PositiveFloat = 10.0
    max_memory_gib: PositiveFloat | None = 4.0
    overlong_buffer: NonNegative = 0
    overlong_penalty: PositiveFloat = 1.0
    noise: NoiseConfig = NoiseConfig()
    noise_by_source: dict[str, NoiseConfig] = Field(default_factory=dict)

    @property
    def noise_words(self) -> str:
        """The kinds of noise, for a person."""
        return "; ".join([self.noise.kind, *(f"{source}: {n.kind}" for source, n in self.noise_by_source.items())])
