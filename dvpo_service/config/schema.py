"""The whole configuration tree. Its larger sections are in algorithm.py, rollouts.py, pools.py and serve.py."""

from __future__ import annotations

import math
import os
from typing import Annotated, Literal, Self

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
    Seed,
)
from dvpo_service.config.data import DataConfig
from dvpo_service.config.pools import CriticConfig, PolicyConfig
from dvpo_service.config.rewards import RewardConfig
from dvpo_service.config.rollouts import RolloutConfig
from dvpo_service.config.serve import ServeConfig


class WarmstartConfig(Section):
    """A small causal LM, trained supervised here, for use where no pretrained model is at hand.

    Attributes:
      files: demonstrations, in rows like those of the training data; the training data itself by default.
      stop_at_accuracy: once greedy decoding reproduces this share of a batch's demonstrations, the learning rate falls
        to 0 over the next tenth of ``steps`` and training ends. When absent, training takes all ``steps``.
      label_smoothing: keeps the policy from being certain, so that its samples differ and RL can improve it.
      judged: share of a batch that are right and wrong answers, made from the training data, to be told apart token by
        token. A critic that starts from the model can then learn what an answer is worth, as one that starts from a
        pretrained model can.
    """

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
    judged: Annotated[float, Field(ge=0, lt=1)] = 0.0
    world_size: Positive = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be a multiple of 32: "
                "vLLM's CPU attention takes no other head size"
            )
        return self


class ModelConfig(Section):
    """The model to train: a Hugging Face folder or hub name (``path``), or one that ``warmstart`` makes."""

    path: str | None = None
    warmstart: WarmstartConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False

    @field_validator("path")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path else path

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.warmstart is None):
            raise ValueError(
                "give exactly one of path (a folder or hub name) and warmstart (make one here); null clears the other"
            )
        return self


class TrainerConfig(Section):
    """The training loop.

    Attributes:
      critic_warmup: steps at the start that train the critic alone.
      eval_every, save_every: steps between evaluations and between checkpoints; 0 means at the end only.
      resume: auto continues from the newest checkpoint of the run directory; never starts over.
      eval_samples: samples per prompt in an evaluation.
      max_bad_steps: after this many steps in a row with a loss or gradient that is not finite, or with values that run
        away from every return seen, the run stops.
    """

    num_steps: Positive = 100
    seed: Seed = 0
    run_dir: str | None = None
    resume: Literal["auto", "never"] = "auto"
    critic_warmup: NonNegative = 0
    eval_every: NonNegative = 25
    eval_samples: Positive = 4
    save_every: NonNegative = 50
    keep_checkpoints: Positive = 2
    max_bad_steps: Positive = 3


class TrackingConfig(Section):
    """Where metrics go. ``mlflow_uri`` is any MLflow tracking URI; the default is a SQLite file beside the runs."""

    mlflow: bool = True
    mlflow_uri: str | None = None
    experiment: str = "dvpo"
    run_name: str | None = None
    sample_rows: NonNegative = 16
    fan_prompts: NonNegative = 3
    tags: dict[str, str] = Field(default_factory=dict)


class ClusterConfig(Section):
    """The Ray cluster, and the resources of each actor.

    A pool may restart actors ``max_restarts`` times within ``restart_window_s``. After an actor's k-th death in a row
    the restart waits ``restart_backoff_s`` x 2^(k-1), at most ``restart_backoff_max_s``.

    Attributes:
      address: of a running cluster; null starts one on this machine.
      in_process: run everything in this process, without actors: policy, critic and rewards one after the other, and
        sampling by transformers. For small models, for debugging, and where vLLM does not run (docs/in-process.md).
    """

    address: str | None = None
    in_process: bool = False
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
    """Everything that defines a run."""

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
    def max_rollout_kl(self) -> float:
        """The bound on ``policy/rollout_kl``: ``rollout.max_kl``, or by precision where that is absent.

        There is no default bound where the difference is known: where sampling is truncated, or where
        ``rollout.importance_correction`` asks for its correction.
        """
        r = self.rollout
        known = r.top_p < 1 or r.top_k > 0 or r.importance_correction in ("truncated", "masked")
        if known and r.max_kl is None:
            return math.inf
        return self.precision_kl

    @property
    def precision_kl(self) -> float:
        """The KL per token by which engine and trainer may differ: ``rollout.max_kl``, or what rounding explains."""
        return self.rollout.max_kl or (1e-4 if self.model.dtype == "float32" else 0.1)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and response."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _pools_divide_the_batch(self) -> Self:
        self.critic.check_sizes("critic", self.batch_size, self.max_model_len)
        self.policy.check_sizes("policy", self.batch_size, self.max_model_len)
        return self

    @model_validator(mode="after")
    def _estimators_have_what_they_need(self) -> Self:
        name = self.algorithm.adv_estimator
        n = self.rollout.n
        if n == 1 and self.algorithm.traits.needs_groups:
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
    def _one_process_is_enough(self) -> Self:
        """Refuse what a run in one process would leave out in silence."""
        if not self.cluster.in_process:
            return self
        plain = RolloutConfig()
        wanted: dict[str, tuple[object, object]] = {
            "policy.world_size": (self.policy.world_size, 1),
            "critic.world_size": (self.critic.world_size, 1),
            "rollout.engine": (self.rollout.engine, plain.engine),
            "rollout.num_engines": (self.rollout.num_engines, 1),
            "rollout.tensor_parallel_size": (self.rollout.tensor_parallel_size, 1),
            "rollout.max_staleness": (self.rollout.max_staleness, 0),
            "model.dtype": (self.model.dtype, "float32"),
        }
        for key, (value, needed) in wanted.items():
            if value != needed:
                raise ValueError(f"cluster.in_process runs everything in one process: {key} must be {needed}")
        return self

    @model_validator(mode="after")
    def _engines_have_their_gpus(self) -> Self:
        size = self.rollout.tensor_parallel_size
        if 0 < self.cluster.gpus_per_engine < size:
            raise ValueError(f"rollout.tensor_parallel_size = {size} needs cluster.gpus_per_engine = {size}")
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
