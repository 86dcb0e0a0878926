"""What the loop and the pools talk to, as interfaces. The Ray pools implement them; tests/fakes.py does so in memory.

A step of the loop, in the order of the calls::

    batch = stream.next(step)                            # scored rollouts
    scoring = policy.logprobs_async(batch.rollouts, step)    # log-probs before the update
    advantages, _ = estimator.advantages(batch.rollouts, step)
    rollouts = scoring.result()
    jobs = estimator.update_async(rollouts, step), policy.update_async(rollouts, advantages.advantages, step)
    [job.result() for job in jobs]
    weights.push(version=step + 1)                       # every engine serves the new policy
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from dvpo_service.config import Backend, Config
from dvpo_service.runs.integrity import Files
from dvpo_service.runs.storage import StoragePath
from dvpo_service.types import Advantages, Generated, Metrics, Prompt, Rollouts, Sample, Sampling


class Job(Protocol):
    """Work under way elsewhere."""

    def result(self) -> Metrics:
        """Wait for the end of the work, and return what it measured. Raises what the work raised."""


class ScoringJob(Protocol):
    """Rollouts that get their log-probs elsewhere."""

    def result(self) -> Rollouts:
        """Wait for the log-probs, and return the rollouts with them. Raises what the work raised."""


class SaveJob(Protocol):
    """A part of a checkpoint, of the state at the time it was asked for, being written."""

    def done(self) -> bool:
        """Return soon whether everything is written. Raises what the writing raised, as ``result`` does."""

    def result(self, timeout_s: float | None = None) -> Files:
        """Wait until everything is written; return the files by their path below the part's folder."""


class RolloutStream(Protocol):
    """Scored rollouts, none older than the staleness bound. Its state is behind the batch given last."""

    def next(self, step: int) -> Generated:
        """Return the batch of ``step``, the number of updates done. Steps are asked for in order, each once."""

    def state_dict(self) -> Any:
        """Return where the stream is in the data, as JSON."""

    def load_state_dict(self, state: Any) -> None:
        """Go back to a state: the next batch is the one that came after it."""

    def close(self) -> None:
        """End what the stream does ahead of ``next``."""


class Policy(Protocol):
    """The model that is trained."""

    def logprobs_async(self, rollouts: Rollouts, step: int) -> ScoringJob:
        """Start to compute log-probs before the update, and those of the reference if there is one."""

    def update_async(self, rollouts: Rollouts, advantages: Tensor, step: int) -> Job:
        """Start the update on rollouts with log-probs.

        Args:
          advantages: [B, T] float32, as the loss takes them (prepared).
        """

    def save(self, folder: StoragePath) -> SaveJob:
        """Start to write model, optimizer and schedule as they are now."""

    def load(self, folder: StoragePath) -> None:
        """Restore what ``save`` wrote, at any number of ranks."""

    def export(self, folder: StoragePath) -> None:
        """Write the policy as a Hugging Face folder."""


class Estimator(Protocol):
    """Advantages, and whatever learns to give them."""

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        """Return the advantages of the batch, not whitened, and what was measured on the way."""

    def update_async(self, rollouts: Rollouts, step: int) -> Job:
        """Start the critic's update on the batch whose advantages were computed last; nothing where there is none."""

    def save(self, folder: StoragePath) -> SaveJob:
        """Start to write what is learned, as it is now."""

    def load(self, folder: StoragePath) -> None:
        """Restore what ``save`` wrote, at any number of ranks."""

    def export(self, folder: StoragePath) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it; nothing where there is none."""


class Weights(Protocol):
    """The way of the policy's weights to the engines."""

    def push(self, version: int) -> None:
        """Give every engine the policy's weights; return when each has acknowledged ``version``."""


class Evaluator(Protocol):
    """Held-out accuracy."""

    def run(self, step: int) -> Metrics:
        """Return ``eval/<split>/accuracy`` (sampled) and ``eval/<split>/greedy`` of the weights that engines serve."""


class Tracker(Protocol):
    """Where metrics go."""

    @property
    def run_id(self) -> str | None: ...

    def log(self, step: int, metrics: Metrics) -> None:
        """Log everything measured at a step, in one call."""

    def rewind(self, step: int) -> None:
        """Forget what was logged of ``step`` and later: it will be logged again."""

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log sample responses with their rewards."""


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


class Engine(Protocol):
    """A rollout engine, as an actor: the pool calls these, by Ray or directly in a test.

    An engine of your own (``rollout.engine: module:Class``) derives from this class. It must have ``__init__``,
    ``start``, ``generate`` and ``update_weights``; the defaults below do for the rest where weights come as a file.
    Methods are coroutines: up to 1,000 calls run side by side. A method that finds the engine's own processes dead
    raises ``actors.cluster.pool.EngineLost``; the pool then starts another engine.

    Attributes:
      transfers: the weight transfers that it takes; "safetensors" is a file (see ``update_weights``).
      weight_version: of the weights it holds; -1 stands for those of the model folder.
    """

    transfers: ClassVar[tuple[Backend, ...]] = ("safetensors",)
    weight_version: int

    def __init__(self, config: Config, model_path: str, backend: Backend) -> None: ...

    async def start(self) -> None:
        """Load the model; return when the engine can serve, at once if it does already."""

    async def generate(self, prompts: list[Prompt], sampling: Sampling, seeds: list[int]) -> list[list[Sample]]:
        """Return ``sampling.n`` samples for each prompt, in the prompts' order.

        Args:
          seeds: one a prompt, in [0, 2**31), so that a run can be repeated.
        """

    async def heartbeat(self) -> None:
        """Return when the engine has shown that it is alive."""

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare for updates from this trainer: called when trainer and engines meet."""

    async def shutdown_weight_transfer_engine(self) -> None:
        """Give up what was prepared, also in the middle of an update that its trainer did not finish."""

    async def start_weight_update(self) -> None:
        """Expect an update. Nothing is sampled until ``set_version``, but for what is under way."""

    async def sees(self, path: str, target: str) -> bool:
        """Return whether ``path``, a link to ``target`` on the sender's host, is the same here."""
        return False

    async def update_weights(self, update_info: Any, content: np.ndarray | None = None) -> None:
        """Load new weights in place.

        Args:
          update_info: ``{"path": file}``, a safetensors file with every parameter under its Hugging Face name.
          content: the file's bytes [size] uint8 where the engine does not see the path.
        """

    async def finish_weight_update(self) -> None:
        """The update is complete."""

    async def set_version(self, version: int) -> int:
        """Take note that the weights are ``version``, and return it."""
        self.weight_version = version
        return version

    async def stop(self) -> None:
        """End the engine's own processes."""
