"""The algorithm, read top to bottom. Everything heavy is behind the roles in roles.py.

A step: sample and score responses, compute log-probs and advantages side by side (one after the other where the KL
penalty is in the rewards), whiten them, update critic and policy side by side, give the new weights to the engines.

Step numbers: ``step`` is the number of updates done. Row 0 of the metrics is the evaluation
before training; row k holds update k and, when it is due, the evaluation after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dvpo_service.config import Config
from dvpo_service.errors import engine_mismatch
from dvpo_service.host.stopping import Stopping
from dvpo_service.objectives.measurements import prompt_metrics
from dvpo_service.objectives.preparation import prepare_advantages, prepare_rewards
from dvpo_service.objectives.value_range import largest_return, value_excess
from dvpo_service.roles import Estimator, Evaluator, Observer, Policy, RolloutStream, Tracker, Weights
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.types import Advantages, Generated, Metrics, Rollouts

MAX_VALUE_EXCESS = 1.0  # values of twice the largest return seen; a fitted critic stays below it


@dataclass
class TrainState:
    """What the loop itself has to remember."""

    step: int = 0
    before: Metrics = field(default_factory=dict)
    after: Metrics = field(default_factory=dict)
    bad_steps: int = 0
    seconds: float = 0.0
    largest_return: float = 0.0  # the largest absolute return of any token so far
    value_excess: float = 0.0  # of the last step, as objectives/value_range.py has it
    values_grow: bool = False  # it was larger than at the step before; fresh heads that are too large shrink


@dataclass
class Roles:
    """Everything that the loop talks to. ``mismatch`` measures engine against trainer log-probs,
    ``health`` counts the restarts of every pool."""

    stream: RolloutStream
    policy: Policy
    estimator: Estimator
    weights: Weights
    evaluator: Evaluator
    observer: Observer
    tracker: Tracker
    mismatch: Callable[[Rollouts], Metrics]
    health: Callable[[], Metrics]


class TrainingStopped(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient, or values that no return explains."""


def train(
    config: Config, roles: Roles, checkpoints: Checkpoints, state: TrainState, stopping: Stopping | None = None
) -> TrainState:
    """Train from ``state`` to ``trainer.num_steps`` updates, and return the state at the end.

    Raises:
      Stopped: on a request to stop, with a checkpoint written.
      TrainingStopped: too many steps in a row were skipped.
      EngineMismatch: the engines do not sample from the policy that is trained.
      PoolError: a pool lost an actor that it cannot replace by itself.
    """
    r, trainer, clock, stopping = roles, config.trainer, Clock(), stopping or Stopping()
    r.weights.push(version=state.step)
    if not state.before:
        with clock("eval"):
            state.before = state.after = r.evaluator.run(0)
            r.observer.observe(0)
        r.tracker.log(0, state.before | clock.pop_metrics())
    for step in stopping.steps(range(state.step, trainer.num_steps)):
        started, boundary = time.perf_counter(), record(state, roles)
        # Until the critic sees the batch the trainers are as the last step left them.
        with stopping.at_boundary(step, partial(save, checkpoints, roles, boundary, wait=True)):
            batch = r.stream.next(step)
            checkpoints.advance()
            scoring, rollouts = r.policy.logprobs_async(batch.rollouts, step), batch.rollouts
            with clock("logprobs"):
                if config.policy.kl.in_reward:  # else the critic is evaluated while the policy scores
                    rollouts = prepare_rewards(scoring.result(), config.policy.kl)
        with clock("advantages"):
            estimate, value_metrics = r.estimator.advantages(rollouts, step)
            value_metrics |= prompt_metrics(rollouts, estimate, config.algorithm.gamma)
        with clock("logprobs"):
            rollouts = rollouts if config.policy.kl.in_reward else scoring.result()
        mismatch = r.mismatch(rollouts)
        stop_if_engines_differ(mismatch, batch, config, step)
        with clock("advantages"):
            advantages = prepare_advantages(estimate.advantages, rollouts.response_mask, config.algorithm)
        with clock("update"):
            jobs = [r.estimator.update_async(rollouts, step)]
            if step >= trainer.critic_warmup:
                jobs.append(r.policy.update_async(rollouts, advantages, step))
            updates = [job.result() for job in jobs]
        with clock("sync"):
            r.weights.push(version=step + 1)

        state.step = step + 1
        metrics = batch.metrics | value_metrics | mismatch | r.health()
        for update in updates:
            metrics |= update
        checkpoints.advance()
        metrics |= watch_values(estimate, rollouts, config.algorithm.gamma, state)
        stop_if_diverging(metrics, state, trainer.max_bad_steps, rollouts, estimate.advantages, checkpoints.run_dir)
        metrics |= clock.pop_metrics() | checkpoints.pop_metrics() | {"time/step": time.perf_counter() - started}
        if due(trainer.eval_every, state.step, trainer.num_steps):
            with clock("eval"):
                state.after = r.evaluator.run(state.step)
                r.observer.observe(state.step)
            r.tracker.log_samples(state.step, batch.rows)
            metrics |= state.after | clock.pop_metrics()
        state.seconds += time.perf_counter() - started
        r.tracker.log(state.step, metrics)
        # Last: a step that a checkpoint holds has been logged, so a run that resumes misses none.
        if due(trainer.save_every, state.step, trainer.num_steps):
            with clock("checkpoint"):
                save(checkpoints, roles, record(state, roles), wait=state.step == trainer.num_steps)
    return state


def due(every: int, step: int, last: int) -> bool:
    """Return whether something is due: every ``every`` steps and at the end; 0 means at the end only."""
    return step == last or bool(every and step % every == 0)


def save(checkpoints: Checkpoints, roles: Roles, record: dict[str, Any], *, wait: bool) -> None:
    """Begin the checkpoint of ``record``'s step, unless it is there or under way; ``wait`` until it is there."""
    step, under_way = record["state"]["step"], checkpoints.saving
    if step not in (checkpoints.newest, under_way and under_way.step):
        checkpoints.begin(step, {"policy": roles.policy.save, "estimator": roles.estimator.save}, record)
    if wait:
        checkpoints.finish()


def record(state: TrainState, roles: Roles) -> dict[str, Any]:
    """Return the small part of a checkpoint, as JSON."""
    return {
        "state": dict(state.__dict__),
        "stream": roles.stream.state_dict(),
        "mlflow_run_id": roles.tracker.run_id,
    }


def stop_if_engines_differ(mismatch: Metrics, batch: Generated, config: Config, step: int) -> None:
    """Stop before the batch is trained on when the engines' log-probs are too far from the trainer's.

    Stale tokens do differ, and those sampled before a recovery may, so only batches sampled now, with the weights of
    this step, are judged, and only if it has a token. Raises EngineMismatch.
    """
    from_before = any(batch.metrics.get(f"rollout/{name}", 0.0) > 0 for name in ("staleness", "reused"))
    kl, bound = mismatch.get("policy/rollout_kl", 0.0), config.max_rollout_kl
    if from_before or kl <= bound or batch.rollouts.num_tokens == 0:
        return
    raise engine_mismatch(f"step {step + 1}", kl, bound)


def watch_values(estimate: Advantages, rollouts: Rollouts, gamma: float, state: TrainState) -> Metrics:
    """Return ``critic/value_excess`` of the step, and remember it and the largest return in ``state``.

    Return nothing where there are no values.
    """
    if estimate.values is None:
        return {}
    mask = rollouts.response_mask
    state.largest_return = max(state.largest_return, largest_return(rollouts.rewards, mask, gamma))
    excess = value_excess(estimate.values, mask, state.largest_return)
    state.values_grow, state.value_excess = excess > state.value_excess, excess
    return {"critic/value_excess": excess}


def stop_if_diverging(
    metrics: Metrics,
    state: TrainState,
    max_bad_steps: int,
    rollouts: Rollouts,
    advantages: Tensor,
    run_dir: Path,
) -> None:
    """Count steps that a trainer skipped, or whose values ran away; after ``max_bad_steps`` in a row stop.

    The batch is kept. Raises TrainingStopped.
    """
    skipped = metrics.get("policy/skipped_steps", 0) + metrics.get("critic/skipped_steps", 0)
    excess = metrics.get("critic/value_excess", 0.0)
    ran_away = excess > MAX_VALUE_EXCESS and state.values_grow
    state.bad_steps = state.bad_steps + 1 if skipped or ran_away else 0
    if state.bad_steps < max_bad_steps:
        return
    path = run_dir / f"bad-batch-{state.step:06d}.safetensors"
    rollouts.save(path, advantages=advantages)
    what, causes = (
        ("a non-finite loss or gradient", "learning rate too high, rewards of a huge scale")
        if skipped
        else (
            f"values whose mean is {1 + excess:.1f} times the largest return seen "
            f"({state.largest_return:g}), and growing",
            "algorithm.bootstrap_truncated=true with an outcome reward, critic.optim.lr too high",
        )
    )
    raise TrainingStopped(
        f"{state.bad_steps} steps in a row had {what}; stopped at step {state.step}. "
        f"The last batch is in {path}. Usual causes: {causes}. "
        "The same command continues from the last checkpoint; give trainer.resume=never to start over"
    )


class Clock:
    """Seconds per stage of a step, as ``time/<stage>``."""

    def __init__(self) -> None:
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        name = f"time/{stage}"
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def pop_metrics(self) -> Metrics:
        """Return what was measured since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds
