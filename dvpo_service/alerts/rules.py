"""Every rule: its condition, a sentence on what is seen, and a sentence on what usually helps.

The bounds are rules of thumb for outcome rewards. Where one was compared with measurements of healthy runs, a comment
says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from dvpo_service.alerts.conditions import (
    Condition,
    critic_explains_nothing,
    critic_mean_off,
    entropy_collapsed,
    fresh_engine_differs,
    gradient_clipped,
    head_spread,
    held_out_falls,
    limit,
    reward_falls,
    steps_skipped,
)

CRITIC_STEPS = 20  # a critic starts from random heads, so its metrics are bad until it has had time to learn


@dataclass(frozen=True)
class Rule:
    """When to give an alert, and its text.

    Attributes:
      name: in the alert and in docs/troubleshooting.md.
      condition: when the metrics are bad.
      seen: what is seen; a format string for the numbers that the condition returns.
      helps: what usually helps; it names config keys.
      after: the first step at which the rule is checked.
      patience: bad measurements in a row before an alert, in place of the Advisor's.
    """

    name: str
    condition: Condition
    seen: str
    helps: str
    after: int = 0
    patience: int | None = None


CRITIC = (
    Rule(
        "critic_not_learning",
        critic_explains_nothing(0.02),
        "The critic explains {value:.3f} of the returns' variance, no more than a constant would.{at_best}",
        "Let it learn more before and beside the policy: raise trainer.critic_warmup or critic.epochs; where the model "
        "can judge already, let the heads learn fast and the body slowly (critic.head_lr, critic.optim.lr).",
        after=CRITIC_STEPS,
    ),
    Rule(
        "critic_mean_off",
        critic_mean_off(0.5),
        "The critic's mean is {value:.3f} and the returns' mean {mean:.3f}, {gap:.1f} of their standard deviations "
        "apart.",
        "Eq. 7 per token only pushes up: use algorithm.form=calibrated, or algorithm.shift_over=batch with a smaller "
        "algorithm.dvpo_loss_weights.shift; otherwise raise critic.epochs.",
        after=CRITIC_STEPS,
    ),
    Rule(
        # A critic that fits its returns stays within them. More than twice the largest, and growing, stops the run.
        "values_leave_the_returns",
        limit("critic/value_excess", ">", 0.25),
        "The critic's mean is {value:.0%} beyond the largest return seen, so it values what no reward pays.",
        "Set algorithm.bootstrap_truncated=false for outcome rewards, and lower critic.optim.lr; a mean of twice the "
        "largest return, and growing, for trainer.max_bad_steps stops the run.",
        after=CRITIC_STEPS,
    ),
    Rule(
        # In a small regression with 0/1 and with normal returns, the error of the calibrated form stays below 0.05,
        # and that of the paper's form is 0.2.
        "quantiles_miscalibrated",
        limit("critic/calibration_error", ">", 0.15, smooth=True),
        "The share of returns below a predicted quantile is off its level by {value:.2f} on average.",
        "The paper's form cannot fit them (algorithm.form=calibrated can: its critic_target, qr_over and huber_delta "
        "matter most); otherwise raise critic.epochs or trainer.critic_warmup.",
        after=CRITIC_STEPS,
    ),
    Rule(
        # With sorted atoms the critic need not learn an order, so good runs stay at the 0.5 of random heads. Only a
        # higher rate is a sign of a problem.
        "quantiles_cross",
        limit("critic/crossing_rate", ">", 0.6),
        "{value:.0%} of the neighbouring quantiles are out of order, more than in random heads.",
        "With algorithm.sort_atoms=true the order does no harm; without it lower critic.optim.lr or "
        "algorithm.n_quantiles.",
        after=CRITIC_STEPS,
    ),
    Rule(
        # In good runs the disagreement is 0.01 of the returns' sd.
        "heads_are_copies",
        head_spread("<", 0.001),
        "The critic's heads differ by {value:.1e}, {share:.1e} of the returns' standard deviation: one head repeated.",
        "algorithm.qr_over=heads trains each by itself; lower algorithm.dvpo_loss_weights.consist, or save the memory "
        "with algorithm.n_heads=1.",
        after=CRITIC_STEPS,
    ),
    Rule(
        "heads_disagree",
        head_spread(">", 0.5),
        "The critic's heads differ by {value:.3f}, {share:.1f} of the returns' standard deviation.",
        "Raise algorithm.dvpo_loss_weights.consist or trainer.critic_warmup, or lower critic.optim.lr.",
        after=CRITIC_STEPS,
    ),
    Rule(
        "critic_gradient_clipped",
        gradient_clipped("critic", 10),
        "The critic's gradient norm is {value:.3g}, {times:.0f} times its clip, and has been for a while.",
        "Lower critic.optim.lr or the largest of algorithm.dvpo_loss_weights (critic/weighted/* shows which), or raise "
        "critic.optim.max_grad_norm if the returns are large.",
        patience=10,
    ),
)

POLICY = (
    Rule(
        "policy_gradient_clipped",
        gradient_clipped("policy", 10),
        "The policy's gradient norm is {value:.3g}, {times:.0f} times its clip, and has been for a while.",
        "Set algorithm.whiten_advantages=true, lower policy.optim.lr, or raise policy.mini_batch_size.",
        patience=10,
    ),
    Rule(
        "clip_fraction_high",
        limit("policy/clip_fraction", ">", 0.3),
        "{value:.0%} of the tokens are clipped, so much of the batch is wasted.",
        "Lower policy.optim.lr or policy.epochs, or raise policy.mini_batch_size.",
    ),
    Rule(
        "policy_moves_too_far",
        limit("policy/approx_kl", ">", 0.1),
        "One update moves the policy by a KL of {value:.3f} a token.",
        "Lower policy.optim.lr or policy.epochs; policy.dual_clip=3 bounds single tokens that run away.",
    ),
    Rule(
        "policy_left_the_reference",
        limit("policy/ref_kl", ">", 0.5),
        "The policy is a KL of {value:.2f} a token away from the reference model.",
        "Raise policy.kl.coef or lower policy.optim.lr, and read samples: the reward may be earned by a trick.",
    ),
    Rule(
        "entropy_collapsed",
        entropy_collapsed(0.1),
        "The policy's entropy is {value:.4f}, a tenth or less of the {first:.3f} it began with.",
        "If the reward is not at its ceiling, explore more: raise policy.clip_high, policy.entropy_coef or "
        "rollout.temperature, or lower policy.optim.lr.",
    ),
    Rule(
        # With trainer.max_bad_steps at its default of 3, two more skipped steps stop the run: this alert cannot wait.
        "steps_skipped",
        steps_skipped(),
        "{value:.0f} optimizer steps were skipped for a loss or gradient that is not finite.",
        "Lower policy.optim.lr and critic.optim.lr, look for rewards of a huge scale, or use model.dtype=float32; "
        "trainer.max_bad_steps of them in a row stop the run.",
        patience=1,
    ),
)

ROLLOUT = (
    Rule(
        "engine_differs",
        fresh_engine_differs(0.01),
        "The rollout engine's log-probs are a KL of {value:.2g} from the trainer's: other weights or another "
        "precision.",
        "Use model.dtype=float32 or another rollout.weight_transfer, or correct with "
        "rollout.importance_correction=truncated or masked.",
    ),
    Rule(
        "few_effective_samples",
        limit("policy/rollout_ess", "<", 0.5),
        "Importance weights between engine and trainer leave {value:.0%} of the tokens as effective sample.",
        "Find why they differ (rollout.weight_transfer, model.dtype, rollout.max_staleness), or set "
        "rollout.importance_correction=masked with a rollout.importance_cap of 2.",
    ),
    Rule(
        "groups_without_spread",
        limit("reward/groups_without_spread", ">", 0.8),
        "In {value:.0%} of the groups every response has the same reward, which teaches little.",
        "Set rollout.dynamic_sampling=true, raise rollout.n or rollout.temperature, or take prompts that are neither "
        "solved nor hopeless.",
    ),
    Rule(
        "responses_truncated",
        limit("rollout/truncated", ">", 0.5),
        "{value:.0%} of the responses were cut off at the length limit.",
        "Raise rollout.max_new_tokens; if the answers are short, reward.overlong_buffer teaches to end them.",
    ),
    Rule(
        "rewards_fail",
        limit("reward/failed", ">", 0),
        "{value:.0f} responses could not be scored and were left out of the update.",
        "Read their errors in the sample table, mend reward.function, or raise reward.timeout_s or reward.num_workers.",
    ),
)

OUTCOME = (
    Rule(
        "reward_falls",
        reward_falls(0.2),
        "The mean reward fell to {value:.3f} from its best of {best:.3f}.",
        "Lower policy.optim.lr or policy.epochs, or raise policy.kl.coef; warnings that came before this one say more, "
        "and trainer.save_every keeps a way back.",
    ),
    Rule(
        "held_out_falls",
        held_out_falls(0.05),
        "Held-out accuracy on {split} fell from {best:.3f} to {value:.3f} while the training reward rose from "
        "{before:.3f} to {reward:.3f}.",
        "Stop earlier (trainer.num_steps), raise policy.kl.coef, add kinds of prompts to data.train_files, or lower "
        "policy.optim.lr.",
        patience=2,
    ),
)

RULES = (*CRITIC, *POLICY, *ROLLOUT, *OUTCOME)
