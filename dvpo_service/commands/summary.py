"""What a run reports: the facts shown before training, and ``summary.json`` at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dvpo_service.config import Config
from dvpo_service.data.splits import Data
from dvpo_service.host.secrets import mask_uri
from dvpo_service.loop import TrainState
from dvpo_service.runs.checkpoint import Checkpoint
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.step_file import read_metrics
from dvpo_service.runs.storage import StoragePath
from dvpo_service.tracking.tracker import Tracker

LATE = 5  # what is averaged at the end of a run: the last fifth of its updates


def critic_explains(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what shares of the returns' variance the critic's values explain, over the last fifth of the updates.

    Args:
      rows: the metrics of every step.

    Returns:
      ``between_prompts``, and ``within_a_prompt``: right against wrong whole responses to the same prompt. What was not
      measured, or never finite, is left out.
    """
    names = {"between_prompts": "critic/explained_variance_between", "within_a_prompt": "critic/explained_variance_end"}
    late = [row for row in rows if row["step"] > rows[-1]["step"] * (1 - 1 / LATE)]
    values = {k: [row[name] for row in late if row.get(name) is not None] for k, name in names.items()}
    finite = {k: [v for v in of_metric if math.isfinite(v)] for k, of_metric in values.items()}
    return {k: round(fmean(v), 4) for k, v in finite.items() if v}


def plan_facts(model_path: str, data: Data, run_dir: StoragePath, resume: Checkpoint | None) -> dict[str, Any]:
    """Return what the terminal shows of a run before training, by name."""
    facts: dict[str, Any] = {
        "model": model_path,
        "train_prompts": len(data.train),
        "val_prompts": {name: len(d) for name, d in data.held_out.items()},
        "run_dir": str(run_dir),
    }
    everything = {"train": data.train} | data.held_out
    if left_out := "; ".join(f"{name}: {d.left_out}" for name, d in everything.items() if d.left_out):
        facts["left_out"] = left_out
    if resume:
        facts["resumed_from"] = resume.record["state"]["step"]
    return facts


def summarize(config: Config, state: TrainState, run: RunDir, tracker: Tracker, seconds: float) -> dict[str, Any]:
    """Write ``summary.json`` to the run's local folder, and return its content.

    It has the accuracy by split before and after training, what the critic explains (``critic_explains``), and the
    paths of the results. ``graded`` names the splits whose rewards are not all 0 or 1, so that their accuracy is a mean
    reward.

    Args:
      seconds: duration of this start of the run; ``training_seconds`` counts all of its starts.
    """

    def by_split(metrics: dict[str, float], name: str) -> dict[str, float | None]:
        """JSON has no NaN: where nothing could be scored the figure is null."""
        found = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval/") and k.endswith(f"/{name}")}
        return {split: value if math.isfinite(value) else None for split, value in found.items()}

    after = by_split(state.after, "accuracy")
    unscored = [
        f"held-out split {split}: no response could be scored at step {state.step}, so it has no accuracy; look at "
        "reward/failed, and try the reward function on a row of the split"
        for split, value in after.items()
        if value is None
    ]
    summary = {
        "name": config.name,
        "steps": state.step,
        "seconds": round(seconds, 1),
        "training_seconds": round(state.seconds, 1),
        "held_out_before": by_split(state.before, "accuracy"),
        "held_out_after": after,
        "held_out_greedy_before": by_split(state.before, "greedy"),
        "held_out_greedy_after": by_split(state.after, "greedy"),
        "graded": list(by_split(state.after, "graded")),
        "critic_explains": critic_explains(read_metrics(run.local / "metrics.jsonl")),
        "warnings": [*tracker.advice, *unscored],
        "where": {
            "run": str(run.location),
            "policy": str(run.location / "policy"),
            "metrics": str(run.location / "metrics.jsonl"),
            "checkpoints": str(run.location / "checkpoints"),
            "mlflow_tracking_uri": mask_uri(tracker.tracking_uri or ""),
            "mlflow_run_id": tracker.run_id or "",
        },
    }
    temporary = run.local / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    temporary.replace(run.local / "summary.json")  # complete or absent: a sweep's report may read it at any time
    return summary
