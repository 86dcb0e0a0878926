"""The settings that a run was trained with: ``config.yaml``, and ``settings.jsonl`` where they changed on the way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dvpo_service.config import Config, to_yaml
from dvpo_service.errors import TrackingError
from dvpo_service.host.secrets import flatten
from dvpo_service.runs.step_file import StepFile, read_metrics
from dvpo_service.runs.storage import StoragePath

CONFIG_FILE, SETTINGS_FILE = "config.yaml", "settings.jsonl"
# Keys that say where and how a run is carried out or shown, not what is trained.
CARRIED_OUT_BY = ("name", "tracking.", "cluster.", "serve.", "trainer.run_dir", "trainer.resume", "trainer.keep_")


def settings_of(config: Config) -> dict[str, Any]:
    """Return the config as ``config.yaml`` holds it: plain YAML values, secrets masked."""
    return yaml.safe_load(to_yaml(config))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings of training that differ, as ``key: old -> new``; ``-`` stands for a key that is not there."""
    old, new = flatten(before), flatten(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, '-')} -> {new.get(key, '-')}" for key in keys if not key.startswith(CARRIED_OUT_BY)]


def recorded(folder: StoragePath) -> dict[str, Any] | None:
    """Return the settings in the folder's ``config.yaml``, or None without a readable one.

    Keys that are newer than the file have their defaults.
    """
    try:
        tree = yaml.safe_load((folder / CONFIG_FILE).read_text())
        return settings_of(Config.model_validate(tree))
    except ValidationError:  # written by a version with other keys
        return tree if isinstance(tree, dict) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def record_settings(run_dir: Path, config: Config, step: int) -> list[str]:
    """Write the settings that training goes on with from ``step``; return those that differ from the step before.

    ``settings.jsonl`` has a line for each step from which other settings held. A line of a start that trained nothing
    is replaced by that of the next start.
    """
    now, file = settings_of(config), run_dir / SETTINGS_FILE
    before = recorded(run_dir)
    if step and not file.exists() and before is not None:  # a run of a version without this file
        _append(file, 0, before)
    lines = _append(file, step, now)
    (run_dir / CONFIG_FILE).write_text(to_yaml(config))
    return changes(lines[-2]["config"], now) if len(lines) > 1 and lines[-1]["step"] == step else []


def settings_changes(run_dir: Path, step: int) -> dict[int, list[str]]:
    """Return what changed on the way to ``step``, by the step from which it held."""
    try:
        lines = [line for line in read_metrics(run_dir / SETTINGS_FILE) if line["step"] < step]
    except TrackingError:
        return {}
    found = {now["step"]: changes(before["config"], now["config"]) for before, now in pairwise(lines)}
    return {at: what for at, what in found.items() if what}


def _append(file: Path, step: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the settings from ``step`` on, unless they are those before it. Return all lines."""
    lines = StepFile(file, resume_step=step)
    try:
        rows = lines.rows
        if not rows or rows[-1]["config"] != settings:
            row = {"step": step, "config": settings}
            lines.append(row)
            rows = [*rows, row]
        return rows
    finally:
        lines.close()
