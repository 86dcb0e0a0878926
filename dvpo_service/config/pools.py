"""``critic`` and ``policy``: the two groups of training processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dvpo_service.algo.choices import Aggregation, KlKind, KlPlace
from dvpo_service.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from dvpo_service.registry import policy_losses


class OptimConfig(Section):
    """AdamW and its learning-rate schedule; ``max_grad_norm`` clips the gradient's norm."""

    lr: PositiveFloat
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: PositiveFloat = 1.0


class LoraConfig(Section):
    """Train low-rank adapters in place of the weights (arXiv 2106.09685, by peft).

    Attributes:
      rank: of an adapter's two matrices.
      alpha: their product is multiplied by alpha / rank.
      target_modules: the linear layers that get an adapter, by the last part of their names; ``all-linear`` is every
        one but the output layer. The experts of a mixture are none.
    """

    rank: Positive = 16
    alpha: Positive = 32
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"


class TrainerPool(Section):
    """Settings that the critic's and the policy's pool share. Batch sizes count sequences.

    Attributes:
      mini_batch_size: sequences per optimizer step over all ranks; the whole batch when absent.
      micro_batch_size: sequences per forward pass of one rank, at most.
      max_tokens_per_micro_batch: tokens per forward pass of one rank, at most: prompts, responses and padding. Each
        forward pass then takes sequences of similar length. When absent, it takes them as they come, and only
        ``micro_batch_size`` counts.
      packing: lay a micro-batch's sequences end to end instead of padding them.
      lora: train adapters, and leave the weights as they are. Gradients, optimizer and checkpoints are then those of
        the adapters alone, and the policy's reference is the policy with its adapters off.
      defer_gradient_reduction: reduce gradients over the ranks once per optimizer step instead of once per micro-batch.
        It saves network traffic, and every rank then holds a float32 gradient of the whole model.
    """

    world_size: Positive = 1
    epochs: Positive = 1
    mini_batch_size: Positive | None = None
    micro_batch_size: Positive = 64
    max_tokens_per_micro_batch: Positive | None = None
    gradient_checkpointing: bool = False
    packing: bool = False
    lora: LoraConfig | None = None
    defer_gradient_reduction: bool = False
    step_timeout_s: PositiveFloat = 1800.0

    def check_sizes(self, name: str, batch_size: int, max_model_len: int) -> None:
        """Raise ValueError when batches of ``batch_size`` sequences, or one sequence, do not fit the pool's sizes."""
        mini, budget = self.mini_batch_size or batch_size, self.max_tokens_per_micro_batch
        if batch_size % mini or mini % self.world_size:
            raise ValueError(
                f"{name}: the batch of prompts_per_step x n = {batch_size} responses must divide into "
                f"mini-batches of {name}.mini_batch_size = {mini}, those over world_size = {self.world_size} ranks"
            )
        if budget is not None and budget < max_model_len:
            raise ValueError(
                f"{name}.max_tokens_per_micro_batch = {budget} is less than one sequence may have: "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {max_model_len}"
            )


class CriticConfig(TrainerPool):
    """Settings of the critic alone.

    Attributes:
      head_lr: the learning rate of the value heads, which start from random weights; ``optim.lr`` when absent.
      value_clip: bounds how far a scalar critic (gae, robust_gae) may move from its old value in one step.
    """

    optim: OptimConfig = OptimConfig(lr=5e-4)
    head_lr: PositiveFloat | None = None
    init_from_policy: bool = True
    value_clip: PositiveFloat | None = None

    @model_validator(mode="after")
    def _adapters_adapt_something(self) -> Self:
        if self.lora and not self.init_from_policy:
            raise ValueError("lora adapts the policy's model: init_from_policy=false would freeze random weights")
        return self


def kind_default(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of the KL's ``kind``, which follows ``where``."""
    return {"kind": "k1" if given.get("where") == "reward" else "k3"}


class KLConfig(Section):
    """KL penalty to the frozen reference policy. With ``coef`` 0 there is none, and no reference is loaded.

    ``kind`` is k1 in the reward and k3 in the loss by default (docs/algorithm.md)."""

    coef: NonNegativeFloat = 0.0
    where: KlPlace = "loss"
    kind: KlKind

    @property
    def in_reward(self) -> bool:
        """Whether the rewards change once the log-probs are known."""
        return self.coef > 0 and self.where == "reward"

    @model_validator(mode="before")
    @classmethod
    def _kind_by_place(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return kind_default(given) | given

    @model_validator(mode="after")
    def _has_the_gradient_of_the_kl(self) -> Self:
        if self.coef == 0:
            return self
        if self.where == "loss" and self.kind == "k1":
            raise ValueError(
                "kind=k1 with where=loss does nothing: the expected gradient of k1 is 0; use k2 or k3, or where=reward"
            )
        if self.where == "reward" and self.kind != "k1":
            raise ValueError(
                f"kind={self.kind} with where=reward has another gradient than the KL (arXiv 2510.01555); use k1"
            )
        return self


class PolicyConfig(TrainerPool):
    """The policy's loss; docs/algorithm.md explains every key.

    Attributes:
      loss: ppo, gspo, cispo, or ``module:name`` of your own (docs/extending.md).
      dual_clip: bounds PPO's loss of a token with negative advantage and a very large ratio; above 1, or null for off.
      loss_agg: how tokens and sequences share the loss.
    """

    optim: OptimConfig = OptimConfig(lr=1e-4)
    loss: Annotated[str, AfterValidator(policy_losses.check_name)] = "ppo"
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    loss_agg: Aggregation = "token_mean"
    entropy_coef: float = 0.0
    kl: KLConfig = Field(default_factory=lambda: KLConfig.model_validate({}))

    @model_validator(mode="after")
    def _dual_clip_is_of_ppo(self) -> Self:
        if self.dual_clip is not None and self.loss in ("gspo", "cispo"):
            raise ValueError(f"dual_clip={self.dual_clip:g} has no effect with loss={self.loss}; set dual_clip=null")
        return self
