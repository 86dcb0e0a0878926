"""The whole configuration tree. Every key stands here, in algorithm.py or in pools.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dvpo_service.config.algorithm import AlgorithmConfig
from dvpo_service.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from dvpo_service.config.pools import CriticConfig, PolicyConfig
from dvpo_service.config.serve import ServeConfig


class WarmstartConfig(Section):
    """A small causal LM made and trained supervised, where no pretrained model is at hand.

    ``files``: demonstrations, rows like the training data's; the training data itself by default.
    ``stop_at_accuracy``: once this share of the demonstrations in a batch is reproduced greedily, the
    learning rate falls to 0 over the next tenth of ``steps`` and training ends; by default at ``steps``.
    ``label_smoothing`` leaves the policy room to explore, and its samples something to gain."""

    files: list[str] | None = None
    hidden_size: Positive = 128
    num_layers: Positive = 3
    num_heads: Positive = 4
    max_positions: Positive = 1024
    steps: Positive = 600
    stop_at_accuracy: Fraction | None = None
    batch_size: Positive = 128
    lr: PositiveFloat = 1e-3
    label_smoothing: Probability = 0.0
    world_size: Positive = 1
    seed: int = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be a multiple of 32: "
                "vLLM's CPU attention takes no other head size"
            )
        return self


class ModelConfig(Section):
    """``path``: a Hugging Face folder or hub name. Without it, ``warmstart`` makes the model."""

    path: str | None = None
    warmstart: WarmstartConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.warmstart is None):
            raise ValueError("give exactly one of path (a folder or hub name) and warmstart (make one here)")
        return self


class DataConfig(Section):
    """Files are JSONL or Parquet. ``val_files``: split name to files; a bare path names its own split.
    ``val_fraction`` instead holds that share of the training rows out, as the split ``held_out``."""

    train_files: list[str] = Field(min_length=1)
    val_files: dict[str, list[str]] = Field(default_factory=dict)
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    gsm8k_mode: Literal["question", "calculation"] = "question"
    operators: str = Field("+-", pattern=r"^[-+*/]+$")
    max_operands: Annotated[int, Field(ge=2)] = 2
    max_digits: Positive = 4
    chat_template: bool = True
    max_prompt_tokens: Positive = 64
    on_bad_row: Literal["stop", "skip"] = "stop"
    val_limit: Positive | None = None

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("val_files", mode="before")
    @classmethod
    def _named_splits(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            files = [value] if isinstance(value, str) else value
            return {Path(str(f)).stem: [f] for f in files}
        if isinstance(value, dict):
            return {k: [v] if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _something_held_out(self) -> Self:
        if bool(self.val_files) == (self.val_fraction is not None):
            raise ValueError("give exactly one of val_files (files to evaluate on) and val_fraction (of train_files)")
        return self


class RolloutConfig(Section):
    """``heartbeat_s``: how often an engine is asked; one silent for ``heartbeat_timeout_s`` is replaced.
    ``reuse_gib``: memory for scored rollouts, which steps done again after a fault take from there.
    ``dynamic_sampling``: groups whose rewards are all equal teach nothing; draw more prompts in their
    place, up to ``max_draws`` batches. ``max_staleness``: a batch is generated while up to that many
    updates before its own are made, and no token of it is from older weights; 0 is on-policy, the stages one
    after the other. ``importance_correction`` weighs tokens by trainer / engine
    probability: ``truncated`` at ``importance_cap``, or ``masked`` (0) above it and below
    ``importance_floor``; ``auto`` is ``truncated`` where ``max_staleness`` is above 0."""

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
    weight_transfer: Literal["auto", "safetensors", "nccl", "ipc"] = "auto"
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

    kind: Literal["none", "flip", "gaussian", "majority_vote"] = "none"
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


class TrainerConfig(Section):
    num_steps: Positive = 100
    seed: int = 0
    run_dir: str | None = None
    resume: Literal["auto", "never"] = "auto"
    critic_warmup: NonNegative = 0
    eval_every: NonNegative = 25
    eval_samples: Positive = 4
    save_every: NonNegative = 50
    keep_checkpoints: Positive = 2
    max_bad_steps: Positive = 3


class TrackingConfig(Section):
    """``mlflow_uri``: any MLflow tracking URI; by default a SQLite file beside the runs."""

    mlflow: bool = True
    mlflow_uri: str | None = None
    experiment: str = "dvpo"
    run_name: str | None = None
    sample_rows: NonNegative = 16
    fan_prompts: NonNegative = 3
    tags: dict[str, str] = Field(default_factory=dict)


class ClusterConfig(Section):
    """``address`` of a running Ray cluster, or null to start one here. Resources are per actor.
    A pool may restart actors ``max_restarts`` times within ``restart_window_s``; the k-th death in a row
    of one waits ``restart_backoff_s`` x 2^(k-1), at most ``restart_backoff_max_s``."""

    address: str | None = None
    num_cpus: Positive | None = None
    cpus_per_trainer: PositiveFloat = 1.0
    cpus_per_engine: PositiveFloat = 1.0
    cpus_per_reward_worker: PositiveFloat = 0.5
    gpus_per_trainer: NonNegativeFloat = 0.0
    gpus_per_engine: NonNegativeFloat = 0.0
    placement_timeout_s: PositiveFloat = 60.0
    max_restarts: NonNegative = 10
    restart_window_s: PositiveFloat = 3600.0
    restart_backoff_s: NonNegativeFloat = 1.0
    restart_backoff_max_s: PositiveFloat = 60.0


class Config(Section):
    name: str = "run"
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig.model_validate({}))
    critic: CriticConfig = CriticConfig()
    policy: PolicyConfig = PolicyConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.rollout.prompts_per_step * self.rollout.n

    @property
    def max_model_len(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for name, pool in (("critic", self.critic), ("policy", self.policy)):
            mini = pool.mini_batch_size or self.batch_size
            if self.batch_size % mini or mini % pool.world_size:
                raise ValueError(
                    f"{name}: the batch of prompts_per_step x n = {self.batch_size} responses must divide into "
                    f"mini-batches of {mini}, and those over world_size = {pool.world_size} ranks"
                )
        return self

    @model_validator(mode="after")
    def _estimators_have_what_they_need(self) -> Self:
        name, n = self.algorithm.adv_estimator, self.rollout.n
        if n == 1 and name in ("grpo", "dr_grpo", "rloo"):
            raise ValueError(f"algorithm.adv_estimator={name} compares a prompt's samples: rollout.n must be 2 or more")
        if n == 1 and self.rollout.dynamic_sampling:
            raise ValueError("rollout.dynamic_sampling drops groups without spread: rollout.n must be 2 or more")
        if self.trainer.critic_warmup and not self.algorithm.has_critic:
            raise ValueError(f"trainer.critic_warmup: algorithm.adv_estimator={name} has no critic")
        if self.reward.overlong_buffer >= self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong_buffer = {self.reward.overlong_buffer} must be shorter than "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _engines_have_their_gpus(self) -> Self:
        gpus, wanted = self.cluster.gpus_per_engine, self.rollout.tensor_parallel_size
        if 0 < gpus < wanted:
            raise ValueError(f"rollout.tensor_parallel_size = {wanted} needs cluster.gpus_per_engine = {wanted}")
        return self

    @model_validator(mode="after")
    def _model_holds_the_sequence(self) -> Self:
        warm = self.model.warmstart
        if warm and warm.max_positions < self.max_model_len:
            raise ValueError(
                f"max_prompt_tokens + max_new_tokens = {self.max_model_len} is longer than "
                f"model.warmstart.max_positions = {warm.max_positions}"
            )
        return self
