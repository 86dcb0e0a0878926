"""The training loop on in-memory roles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvpo_service.config import TrainerConfig
from dvpo_service.errors import EngineMismatch
from dvpo_service.loop import Roles, TrainingStopped, TrainState, train
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.integrity import Written
from dvpo_service.types import Advantages, Generated, Metrics, Rollouts
from tests.builders import make_config
from tests.fakes import FakeEstimator, FakeEvaluator, FakePolicy, FakeStream, FakeTracker, FakeWeights, Log


def make_roles(log: Log, *, skipped: float = 0.0) -> Roles:
    evaluator = FakeEvaluator(log)
    return Roles(
        stream=FakeStream(log),
        policy=FakePolicy(log, skipped),
        estimator=FakeEstimator(log),
        weights=FakeWeights(log),
        evaluator=evaluator,
        observer=evaluator,
        tracker=FakeTracker(),
        mismatch=lambda rollouts: {"policy/rollout_kl": 0.0},
        health=lambda: {"pool/restarts/policy": 0.0},
    )


def run(tmp_path: Path, trainer: TrainerConfig, roles: Roles, state: TrainState | None = None) -> TrainState:
    config = make_config("model", trainer=trainer.model_dump())
    return train(config, roles, Checkpoints(tmp_path, keep=2), state or TrainState())


def test_order_of_a_step(tmp_path: Path) -> None:
    log = Log()
    run(tmp_path, TrainerConfig(num_steps=1, eval_every=0, save_every=0), make_roles(log))
    assert log.names() == [
        "push",
        "evaluate",
        "observe",
        "generate",
        # the critic is evaluated while the policy scores
        "logprobs",
        "advantages",
        "logprobs done",
        # both updates are under way before either is waited for
        "critic update",
        "policy update",
        "critic done",
        "policy done",
        "push",
        "evaluate",
        "observe",
    ]
    assert [c for c in log.calls if c[0] == "push"] == [("push", 0), ("push", 1)]


def test_with_the_kl_in_the_reward_the_critic_waits_for_the_log_probs(tmp_path: Path) -> None:
    log = Log()
    kl = {"coef": 0.1, "where": "reward"}
    trainer = {"num_steps": 1, "eval_every": 0, "save_every": 0}
    config = make_config("model", trainer=trainer, policy={"kl": kl})
    train(config, make_roles(log), Checkpoints(tmp_path, keep=2), TrainState())
    assert [name for name in log.names() if "log" in name or name == "advantages"] == [
        "logprobs",
        "logprobs done",
        "advantages",
    ]


def test_every_step_is_logged_once_with_its_stages(tmp_path: Path) -> None:
    roles = make_roles(Log())
    state = run(tmp_path, TrainerConfig(num_steps=4, eval_every=2, save_every=2), roles)
    rows = roles.tracker.rows  # type: ignore[attr-defined]
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert [s for s in rows if "eval/val/accuracy" in rows[s]] == [0, 2, 4]
    assert {"time/logprobs", "time/advantages", "time/update", "time/sync", "time/step"} <= set(rows[3])
    assert {"reward/mean", "critic/quantile_mean", "policy/rollout_kl", "policy/loss"} <= set(rows[1])
    assert state.before["eval/val/accuracy"] == 0.0
    assert state.after["eval/val/accuracy"] == 0.4


def test_a_step_is_logged_before_it_is_saved(tmp_path: Path) -> None:
    roles = make_roles(Log())
    logged: list[int] = []

    def save(folder: Path) -> Written:
        logged.append(max(roles.tracker.rows))  # type: ignore[attr-defined]
        return Written({})

    roles.policy.save = save  # type: ignore[method-assign, assignment]
    run(tmp_path, TrainerConfig(num_steps=4, eval_every=0, save_every=2), roles)
    assert logged == [2, 4]


def test_critic_warmup_leaves_the_policy_alone(tmp_path: Path) -> None:
    log = Log()
    run(tmp_path, TrainerConfig(num_steps=3, critic_warmup=2), make_roles(log))
    assert [c[1] for c in log.calls if c[0] == "critic update"] == [0, 1, 2]
    assert [c[1] for c in log.calls if c[0] == "policy update"] == [2]


def test_resume_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, first, second = Log(), Log(), Log()
    config = TrainerConfig(num_steps=4, eval_every=2, save_every=2)
    run(tmp_path / "whole", config, make_roles(whole))
    run(tmp_path / "cut", config.model_copy(update={"num_steps": 2}), make_roles(first))

    roles = make_roles(second)
    checkpoint = Checkpoints(tmp_path / "cut", keep=2).latest()
    assert checkpoint is not None
    assert checkpoint.record["mlflow_run_id"] == "run-1"
    roles.stream.load_state_dict(checkpoint.record["stream"])
    state = run(tmp_path / "cut", config, roles, TrainState(**checkpoint.record["state"]))
    assert second.calls[0] == ("push", 2)
    assert second.calls[1:] == whole.calls[-len(second.calls) + 1 :]
    assert roles.stream.taken == 4  # type: ignore[attr-defined]
    assert state.before["eval/val/accuracy"] == 0.0, "the figure from before training survives"


def test_stops_after_bad_steps_in_a_row_and_keeps_the_batch(tmp_path: Path) -> None:
    config = TrainerConfig(num_steps=9, max_bad_steps=2, save_every=0, eval_every=0)
    with pytest.raises(TrainingStopped, match=r"2 steps in a row.*stopped at step 2"):
        run(tmp_path, config, make_roles(Log(), skipped=1.0))
    batch = load_file(tmp_path / "bad-batch-000002.safetensors")
    assert batch["advantages"].shape == batch["response_mask"].shape


class ValuingEstimator(FakeEstimator):
    """Its values are given by step; the returns of the fakes' batches are at most 1."""

    def __init__(self, log: Log, values: list[float]):
        super().__init__(log)
        self.given = values

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        estimate, metrics = super().advantages(rollouts, step)
        return replace(estimate, values=torch.full_like(estimate.advantages, self.given[step])), metrics


def test_values_that_no_return_explains_stop_the_run(tmp_path: Path) -> None:
    roles = make_roles(Log())
    roles.estimator = ValuingEstimator(Log(), [0.5, 0.9, 3.0, 4.0, 5.0, 9.0])
    config = TrainerConfig(num_steps=6, max_bad_steps=3, save_every=0, eval_every=0)
    with pytest.raises(
        TrainingStopped, match=r"3 steps in a row had values whose mean is 5\.0 times .*bootstrap_trunc"
    ):
        run(tmp_path, config, roles)
    assert (tmp_path / "bad-batch-000005.safetensors").is_file()
    assert roles.tracker.rows[3]["critic/value_excess"] == pytest.approx(2.0)  # type: ignore[attr-defined]


def test_values_that_are_too_large_at_first_and_shrink_do_not(tmp_path: Path) -> None:
    roles = make_roles(Log())
    roles.estimator = ValuingEstimator(Log(), [9.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    state = run(tmp_path, TrainerConfig(num_steps=6, max_bad_steps=3, save_every=0, eval_every=0), roles)
    assert state.step == 6


def test_a_batch_of_engines_that_hold_another_policy_is_not_trained_on(tmp_path: Path) -> None:
    log = Log()
    roles = make_roles(log)
    roles.mismatch = lambda rollouts: {"policy/rollout_kl": 0.27}
    with pytest.raises(EngineMismatch, match=r"step 1: .* a KL of 0\.27 per token .* rollout\.max_kl = 0\.0001"):
        run(tmp_path, TrainerConfig(num_steps=2), roles)
    assert "policy update" not in log.names()
    assert "critic update" not in log.names()


def test_a_batch_with_log_probs_that_are_no_numbers_is_not_trained_on(tmp_path: Path) -> None:
    roles = make_roles(Log())
    roles.mismatch = lambda rollouts: {"policy/rollout_kl": float("nan")}
    with pytest.raises(EngineMismatch, match="a KL of nan per token"):
        run(tmp_path, TrainerConfig(num_steps=2), roles)


def test_a_batch_without_a_token_has_no_kl_and_is_no_mismatch(tmp_path: Path) -> None:
    roles = make_roles(Log())
    roles.mismatch = lambda rollouts: {"policy/rollout_kl": float("nan")}
    next_batch = roles.stream.next

    def empty(step: int) -> Generated:
        batch = next_batch(step)
        mask = torch.zeros_like(batch.rollouts.response_mask)
        return replace(batch, rollouts=batch.rollouts.with_(response_mask=mask))

    roles.stream.next = empty  # type: ignore[method-assign]
    assert run(tmp_path, TrainerConfig(num_steps=2), roles).step == 2


@pytest.mark.parametrize("why", ["rollout/staleness", "rollout/reused"])
def test_tokens_of_before_may_differ_from_the_trainers(tmp_path: Path, why: str) -> None:
    roles = make_roles(Log())
    roles.mismatch = lambda rollouts: {"policy/rollout_kl": 0.27}
    next_batch = roles.stream.next

    def stale(step: int) -> Generated:
        batch = next_batch(step)
        return replace(batch, metrics=batch.metrics | {why: 1.0})

    roles.stream.next = stale  # type: ignore[method-assign]
    assert run(tmp_path, TrainerConfig(num_steps=2), roles).step == 2


@pytest.mark.parametrize(
    ("rollout", "dtype", "bound"),
    [
        ({}, "float32", 1e-4),
        ({}, "bfloat16", 0.1),
        ({"max_kl": 0.5}, "float32", 0.5),
        ({"top_p": 0.9, "importance_correction": "none"}, "float32", float("inf")),
        ({"importance_correction": "truncated"}, "float32", float("inf")),
        ({"max_staleness": 1}, "float32", 1e-4),
    ],
)
def test_the_bound_on_the_engines_log_probs(rollout: dict[str, Any], dtype: str, bound: float) -> None:
    plain = make_config("model", rollout=rollout)
    config = plain.model_copy(update={"model": plain.model.model_copy(update={"dtype": dtype})})
    assert config.max_rollout_kl == bound
