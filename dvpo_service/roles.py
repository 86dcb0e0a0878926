"""What loop.py talks to. The Ray pools implement these; tests/fakes.py does so in memory."""

from __future__ import annotations

from typing import Any, Protocol

from dvpo_service.integrity import Files
from dvpo_service.storage import Place
from dvpo_service.types import Advantages, Generated, Metrics, Rollouts


class Job(Protocol):
    """Work under way elsewhere."""

    def result(self) -> Metrics: ...


class SaveJob(Protocol):
    """A part of a checkpoint, of the state at the time it was asked for, being written."""

    def done(self) -> bool:
        """Whether it is all written. Returns soon; raises what the writing raised, as ``result`` does."""

    def result(self, timeout_s: float | None = None) -> Files:
        """Waits until it is. What was written, by path below the part's folder."""


class RolloutStream(Protocol):
    """Scored rollouts, none older than the staleness bound. Where it is in the data is behind the batch given last."""

    def next(self, step: int) -> Generated: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...
    def close(self) -> None:
        """End what it does ahead of ``next``."""


class Policy(Protocol):
    def logprobs(self, rollouts: Rollouts, step: int) -> Rollouts:
        """Adds proximal and reference log-probs, and a KL penalty to the rewards if configured."""

    def update_async(self, rollouts: Rollouts, advantages: Advantages, step: int) -> Job: ...
    def save(self, folder: Place) -> SaveJob: ...
    def load(self, folder: Place) -> None: ...
    def export(self, folder: Place) -> None: ...


class Estimator(Protocol):
    """Advantages, and whatever learns to give them."""

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]: ...
    def update_async(self, rollouts: Rollouts, step: int) -> Job: ...
    def save(self, folder: Place) -> SaveJob: ...
    def load(self, folder: Place) -> None: ...
    def export(self, folder: Place) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it; nothing where there is none."""


class Weights(Protocol):
    def push(self, version: int) -> None:
        """Returns when every engine has acknowledged ``version``."""


class Evaluator(Protocol):
    def run(self, step: int) -> Metrics:
        """Held-out accuracy, ``eval/<split>/accuracy`` and ``eval/<split>/greedy``."""


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...
    def rewind(self, step: int) -> None:
        """What was logged of ``step`` and later will be logged again."""

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...


class Display(Protocol):
    """Who is told how a run goes: the terminal, or the sweep that a run is a trial of. Entered while it trains."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: object) -> None: ...
    def status(self, text: str) -> None: ...
    def update(self, step: int, metrics: Metrics) -> None: ...
    def note(self, text: str) -> None: ...


class Observer(Protocol):
    """Pictures of the critic, taken when the policy is evaluated."""

    def observe(self, step: int) -> None: ...
