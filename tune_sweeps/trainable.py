"""A trial: one training run of the service, inside the trial's placement group."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory

from actors.cluster.placement import plan_bundles
from actors.rollouts.engines import WarmEngines
from dvpo_service.commands.train import train
from dvpo_service.config import Config
from dvpo_service.host.failure import describe
from dvpo_service.runs.step_file import read_metrics
from tune_sweeps.plan import Job
from tune_sweeps.records import TrialState

# Tune runs trial after trial in the same actor process (reuse_actors), so engines started there can be kept.
_WARM = WarmEngines()
OWN_CPU = 0.1  # the loop waits for its pools most of the time


def trial_resources(config: Config) -> PlacementGroupFactory:
    """Return the trial's placement group: a bundle for its loop, then one for each actor of the run."""
    bundles = [{k: float(v) for k, v in b.resources.items()} for b in plan_bundles(config)]
    return PlacementGroupFactory([{"CPU": OWN_CPU}, *bundles], strategy="PACK")


def run_trial(params: Mapping[str, Any], job: Job) -> None:
    """Train to the end, from the trial's own checkpoint if there is one. Report each evaluation to Tune.

    A trial that is already done only reports its last metrics. Errors are raised, so that Tune tries again, then counts
    the trial as failed and goes on; ``--resume`` tries it again.

    Args:
      params: Tune's parameters, see ``space.param_space``.
    """
    os.chdir(job.cwd)
    sys.path.insert(0, str(job.cwd))  # for module:function rewards in the user's folder
    plan = job.trial(params)
    folder = job.folder / "trials" / plan.folder
    watch = TrialWatch()
    folder.mkdir(parents=True, exist_ok=True)
    state = TrialState.load(folder) or TrialState(plan.arm.name, plan.seed)
    if state.status == "done":
        watch.update(plan.config.trainer.num_steps, read_metrics(folder / "metrics.jsonl")[-1])
        return
    state.status, state.error, state.overrides = "running", "", dict(plan.arm.overrides)
    state.attempts += 1
    state.save(folder)
    started, before = time.time(), state.seconds
    try:
        train(plan.config, folder, watch=watch, warm=_WARM)
        state.status = "done"
    except Exception as error:
        state.status, state.error = "failed", describe(error)[0]
        raise
    finally:
        state.seconds = before + time.time() - started
        state.start_seconds = (watch.began or time.time()) - started
        state.save(folder)


class TrialWatch:
    """A display that reports to Tune instead of the terminal.

    Attributes:
      began: when the first step began, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.reward = float("nan")

    def __enter__(self) -> TrialWatch:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def status(self, text: str) -> None:
        if not text and self.began is None:  # an empty status: the loop begins
            self.began = time.time()

    def note(self, text: str) -> None: ...

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.reward = metrics.get("reward/mean", self.reward)
        accuracies = self.accuracies(metrics)
        if accuracies:
            tune.report({"step": step, "reward": self.reward, **accuracies})

    @staticmethod
    def accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return held-out accuracy by split and, as ``accuracy``, the mean of the splits; {} if there is none."""
        by_split = {k: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith("/accuracy")}
        if not by_split:
            return {}
        return {"accuracy": sum(by_split.values()) / len(by_split), **by_split}
