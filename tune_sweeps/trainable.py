"""One trial = one launch of the service, inside the trial's placement group."""

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
from dvpo_service.errors import UserError
from dvpo_service.host.failure import describe
from dvpo_service.runs.step_file import read_metrics
from tune_sweeps.plan import Job
from tune_sweeps.records import TrialState

# Tune gives one actor process to trial after trial (reuse_actors): engines started there stay warm.
_WARM = WarmEngines()
OWN_CPU = 0.1  # the loop waits for its pools most of the time


def trial_resources(config: Config) -> PlacementGroupFactory:
    """A bundle for the trial's loop, then one for each actor of the run."""
    bundles = [{k: float(v) for k, v in b.resources.items()} for b in plan_bundles(config)]
    return PlacementGroupFactory([{"CPU": OWN_CPU}, *bundles], strategy="PACK")


def run_trial(params: Mapping[str, Any], job: Job) -> None:
    """Train to the end, from the trial's own checkpoint if there is one; each evaluation is reported to Tune.

    A trial that is done already only reports. An error of the user's fails it for good; any other is
    raised, so that Tune tries again.
    """
    os.chdir(job.cwd)
    sys.path.insert(0, str(job.cwd))  # for module:function rewards beside the user
    plan = job.trial(params)
    folder, watch = job.folder / "trials" / plan.name, TrialWatch()
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
        if not isinstance(error, UserError):
            raise
    finally:
        state.seconds = before + time.time() - started
        state.start_seconds = (watch.began or time.time()) - started
        state.save(folder)


class TrialWatch:
    """What the loop tells a terminal, told to Tune."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.reward = float("nan")

    def __enter__(self) -> TrialWatch:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def status(self, text: str) -> None:
        if not text and self.began is None:  # the loop begins
            self.began = time.time()

    def note(self, text: str) -> None: ...

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.reward = metrics.get("reward/mean", self.reward)
        if found := self.accuracies(metrics):
            tune.report({"step": step, "reward": self.reward, **found})

    @staticmethod
    def accuracies(metrics: Mapping[str, Any]) -> dict[str, float]:
        """Held-out accuracy by split and, as ``accuracy``, the mean of the splits."""
        found = {k: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith("/accuracy")}
        return {"accuracy": sum(found.values()) / len(found), **found} if found else {}
