"""The roles of the loop in memory, to run the loop without a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dvpo_service.runs.integrity import Written
from dvpo_service.types import Advantages, Generated, Metrics, Rollouts
from tests.builders import make_rollouts, sums_of


@dataclass
class Log:
    """Every call of every role, in order."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __call__(self, *call: Any) -> None:
        self.calls.append(call)

    def names(self) -> list[str]:
        return [c[0] for c in self.calls]


@dataclass
class DoneJob:
    log: Log
    name: str
    metrics: Metrics

    def result(self) -> Metrics:
        self.log(f"{self.name} done")
        return self.metrics


@dataclass
class FakeStream:
    log: Log
    taken: int = 0

    def next(self, step: int) -> Generated:
        self.log("generate", step)
        self.taken += 1
        return Generated(make_rollouts(seed=step), [{"prompt": "1+1="}], {"reward/mean": 0.5})

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def close(self) -> None:
        """Do nothing: no batch is generated ahead."""


@dataclass
class FakeScoring:
    log: Log
    rollouts: Rollouts

    def result(self) -> Rollouts:
        self.log("logprobs done")
        log_probs = self.rollouts.rollout_logprobs
        return self.rollouts.with_(logprobs=log_probs, ref_logprobs=log_probs)


@dataclass
class FakePolicy:
    log: Log
    skipped: float = 0.0

    def logprobs_async(self, rollouts: Rollouts, step: int) -> FakeScoring:
        self.log("logprobs", step)
        return FakeScoring(self.log, rollouts)

    def update_async(self, rollouts: Rollouts, advantages: Tensor, step: int) -> DoneJob:
        self.log("policy update", step)
        return DoneJob(self.log, "policy", {"policy/loss": 0.1, "policy/skipped_steps": self.skipped})

    def save(self, folder: Path) -> Written:
        (folder / "weights").write_text("policy")
        return Written(sums_of(folder))

    def load(self, folder: Path) -> None:
        assert (folder / "weights").read_text() == "policy"

    def export(self, folder: Path) -> None:
        folder.mkdir()


@dataclass
class FakeEstimator:
    log: Log

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        self.log("advantages", step)
        return Advantages(rollouts.rewards), {"critic/quantile_mean": 0.3}

    def update_async(self, rollouts: Rollouts, step: int) -> DoneJob:
        self.log("critic update", step)
        return DoneJob(self.log, "critic", {"critic/dvpo_loss": 0.2})

    def save(self, folder: Path) -> Written:
        (folder / "weights").write_text("critic")
        return Written(sums_of(folder))

    def load(self, folder: Path) -> None:
        assert (folder / "weights").read_text() == "critic"

    def export(self, folder: Path) -> None:
        folder.mkdir()


@dataclass
class FakeWeights:
    log: Log

    def push(self, version: int) -> None:
        self.log("push", version)


@dataclass
class FakeEvaluator:
    log: Log

    def run(self, step: int) -> Metrics:
        self.log("evaluate", step)
        return {"eval/val/accuracy": step / 10, "eval/val/greedy": step / 10}

    def observe(self, step: int) -> None:
        self.log("observe", step)


@dataclass
class FakeTracker:
    run_id: str | None = "run-1"
    rows: dict[int, Metrics] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)

    def log(self, step: int, metrics: Metrics) -> None:
        assert step not in self.rows, f"step {step} was logged twice"
        self.rows[step] = dict(metrics)

    def rewind(self, step: int) -> None:
        self.rows = {s: row for s, row in self.rows.items() if s < step}

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.samples.append(step)
