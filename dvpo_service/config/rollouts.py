"""``rollout`` and ``reward``: how responses are sampled and scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dvpo_service.algo.choices import NoiseKind, SpikeSign
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


class NoiseConfig(Section):
    """Noise on rewards, for experiments (docs/algorithm.md, "Noise on the rewards").

    ``flip`` turns an outcome r in [0, 1] into 1 - r with probability ``p``. ``gaussian`` adds a draw from N(0, sd^2).
    ``spike`` adds one with probability ``p``; with ``sign`` up or down it adds or subtracts the draw's size.
    ``student_t`` adds ``scale`` times a draw from Student's t with ``df`` degrees of freedom. ``majority_vote`` scores
    against the group's most frequent answer.
    """

    kind: NoiseKind = "none"
    p: Probability = 0.0
    sd: NonNegativeFloat = 0.0
    sign: SpikeSign = "both"
    df: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    scale: NonNegativeFloat = 1.0


class RewardConfig(Section):
    """How responses are scored.

    Attributes:
      function: exact_match, gsm8k, math_verify, or ``module:function`` of your own.
      heartbeat_s: how often an idle worker is asked whether it is alive.
      max_memory_gib: a call that takes more memory than this beyond what its worker holds is a failed sample; null
        sets no bound.
      overlong_buffer: tokens before the length limit over which the reward falls by up to ``overlong_penalty``; 0 is
        off.
      noise_by_source: replaces ``noise`` for the prompts of a ``data_source``, as graders differ in reliability.
    """

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
        """The kinds of noise in words, for display."""
        return "; ".join([self.noise.kind, *(f"{source}: {n.kind}" for source, n in self.noise_by_source.items())])
