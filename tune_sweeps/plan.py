"""Turn a grid into trials: resolve and check every config before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvpo_service.config import Config, load_config
from dvpo_service.config.plain_yaml import read_yaml
from dvpo_service.config.spelling import as_meant, kind_of
from dvpo_service.errors import ConfigError, one_line
from tune_sweeps.grid import GRIDS, Arm, Grid
from tune_sweeps.records import Sweep, short_hash, trial_folder, trial_name

SAMPLERS = ("choice", "uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "qrandint", "randn")


@dataclass(frozen=True)
class TrialPlan:
    """One run of the sweep: an arm with a seed, and the resolved config."""

    arm: Arm
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return trial_name(self.arm.name, self.seed)

    @property
    def folder(self) -> str:
        return trial_folder(self.arm.name, self.seed)


def find_grid(name_or_path: str) -> Grid:
    """Return a built-in grid, or read one from a YAML file.

    The file has either ``arms`` (name to overrides) or ``space`` (key to sampler).

    Raises:
      ConfigError: no such grid, invalid YAML, unknown or missing keys, or a sampler that Tune does not have.
    """
    if name_or_path in GRIDS:
        return GRIDS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"no grid {name_or_path!r}: neither a file nor one of {', '.join(GRIDS)}")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), f"grid {path}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"grid {path}: not UTF-8: {one_line(error, None)}") from error
    if not isinstance(tree, dict) or bool(tree.get("arms")) == bool(tree.get("space")):
        raise ConfigError(f"grid {path}: give either arms (name: overrides) or space (key: sampler), and not empty")
    return _user_grid(path, tree)


def _user_grid(path: Path, tree: dict[str, Any]) -> Grid:
    known = set(asdict(GRIDS["forms"]))
    unknown = sorted(set(tree) - known)
    if unknown:
        raise ConfigError(f"grid {path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    tree = {key: _as_meant(key, value) for key, value in tree.items()}
    arms = tuple(Arm(name, values or {}) for name, values in (tree.pop("arms", None) or {}).items())
    bad = [a.name for a in arms if not isinstance(a.overrides, dict)]
    if bad:
        raise ConfigError(f"grid {path}: arm {bad[0]!r} must map dotted config keys to values")
    for key, sampler in (tree.get("space") or {}).items():
        is_single = isinstance(sampler, dict) and len(sampler) == 1
        if not is_single or next(iter(sampler)) not in SAMPLERS:
            raise ConfigError(f"grid {path}: {key}: write one of {', '.join(SAMPLERS)}, as in {{choice: [1, 2]}}")
    if tree.get("reference") not in (None, *(a.name for a in arms)):
        raise ConfigError(f"grid {path}: reference {tree['reference']!r} is none of its arms")
    fields = {"name": path.stem, "title": path.stem} | {k: v for k, v in tree.items() if v is not None}
    return Grid(arms=arms, **fields)


def _as_meant(key: str, value: Any) -> Any:
    """Return a part of a grid's file in plain values; numbers are text where the config key takes text."""
    if key == "arms" and isinstance(value, dict):
        return {name: _overrides(arm) for name, arm in value.items()}
    if key == "space":
        return _overrides(value)
    return as_meant(value, str if key in ("name", "title", "reference") else None)


def _overrides(given: Any) -> Any:
    if not isinstance(given, dict):
        return as_meant(given, None)
    kinds = {key: kind_of(Config, key) for key in given}
    # A sampler is a mapping from its kind to what it draws.
    return {key: as_meant(value, kinds[key]) for key, value in given.items()}


def resolve(config: str, overrides: Sequence[str], arm: Mapping[str, Any], seed: int) -> Config:
    """Return the config of one run.

    Args:
      config: name of a shipped config, or path of a YAML file.
      overrides: changes that all runs of the sweep share.
      arm: the arm's changes, dotted keys and their values.

    Raises:
      ConfigError: a key or value that the config does not take.
    """
    keys = [f"{key}={json.dumps(value)}" for key, value in arm.items()]
    resolved = load_config(config, [*overrides, *keys, f"trainer.seed={seed}"])
    if resolved.model.warmstart is None:
        return resolved
    # Seeds differ in everything that is random, also in the base model. The arms of a seed share one base model.
    return load_config(config, [*overrides, *keys, f"trainer.seed={seed}", f"model.warmstart.seed={seed}"])


def plan_trials(grid: Grid, config: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[TrialPlan]:
    """Return all runs of a grid of arms, seed by seed, so that an interrupted sweep has complete comparisons.

    Raises:
      ConfigError: the grid has no arms, there are no distinct seeds, an override is wrong, or two arms are the same
        run.
    """
    if not grid.arms:
        raise ConfigError(f"grid {grid.name!r} has no arms")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"a sweep needs distinct seeds, got {list(seeds)}")
    trials = [
        TrialPlan(arm, seed, _resolved(grid, config, overrides, arm, seed)) for seed in seeds for arm in grid.arms
    ]
    _refuse_twins(grid, trials)
    return trials


def _resolved(grid: Grid, config: str, overrides: Sequence[str], arm: Arm, seed: int) -> Config:
    try:
        return resolve(config, overrides, arm.overrides, seed)
    except ConfigError as error:
        raise ConfigError(f"grid {grid.name!r}, arm {arm.name!r}: {error}") from error


def _refuse_twins(grid: Grid, trials: Iterable[TrialPlan]) -> None:
    """Raise ConfigError if two arms have the same config."""
    seen: dict[str, str] = {}
    for trial in trials:
        tree = trial.config.model_dump_json()
        if tree in seen:
            raise ConfigError(
                f"grid {grid.name!r}: arms {seen[tree]!r} and {trial.arm.name!r} are the same run; remove one, or an "
                "override that makes them equal"
            )
        seen[tree] = trial.arm.name


@dataclass(frozen=True)
class Job:
    """What every trial needs to know, on whatever node it runs.

    Attributes:
      folder: the sweep's folder.
      cwd: working directory of the sweep; relative paths in the config start there.
      arms: arms by name.
      models: path of the base model by seed; None where the config gives one.
    """

    folder: Path
    cwd: Path
    config: str
    overrides: list[str]
    seeds: list[int]
    arms: dict[str, Arm]
    models: dict[int, str | None]
    mlflow_uri: str | None
    mlflow_run_id: str | None

    @classmethod
    def of(cls, sweep: Sweep, models: dict[int, str | None]) -> Job:
        """Return the job of a sweep, with absolute paths."""
        path = Path(sweep.config)
        return cls(
            folder=sweep.folder.absolute(),
            cwd=Path.cwd(),
            config=str(path.absolute()) if path.is_file() else sweep.config,
            overrides=sweep.overrides,
            seeds=sweep.seeds,
            arms={arm.name: arm for arm in sweep.grid.arms},
            models=models,
            mlflow_uri=sweep.mlflow_uri,
            mlflow_run_id=sweep.mlflow_run_id,
        )

    def trial(self, params: Mapping[str, Any]) -> TrialPlan:
        """Return the run for Tune's ``params`` (see ``space.param_space``)."""
        if "trial" in params:
            name, seed = params["trial"]
            arm = self.arms[name]
        else:
            seed = params["seed"]
            drawn = dict(params["space"])
            arm = Arm(_name_of(drawn), drawn)
        config = resolve(self.config, self.overrides, arm.overrides, seed)
        return TrialPlan(arm, seed, self._placed(config, arm, seed))

    def _placed(self, config: Config, arm: Arm, seed: int) -> Config:
        """Return the config with the seed's base model, and with the sweep's MLflow run as its parent."""
        name = trial_name(arm.name, seed)
        tags = dict(config.tracking.tags) | {"arm": arm.name, "seed": str(seed), "sweep": self.folder.name}
        if self.mlflow_run_id:
            tags["mlflow.parentRunId"] = self.mlflow_run_id
        tracking = {"tags": tags, "run_name": name, "mlflow_uri": self.mlflow_uri}
        update: dict[str, Any] = {"name": name, "tracking": config.tracking.model_copy(update=tracking)}
        model = self.models[seed]
        if model:
            update["model"] = config.model.model_copy(update={"path": model, "warmstart": None})
        return config.model_copy(update=update)


def _name_of(drawn: Mapping[str, Any]) -> str:
    """Return a name for drawn values, rounded to be read; then a hash of the exact ones makes it unique."""
    name = ",".join(f"{k.rpartition('.')[2]}={_short(v)}" for k, v in drawn.items())
    exact = all(_short(v) == str(v) for v in drawn.values())
    return name if exact else f"{name}~{short_hash(json.dumps(dict(drawn), sort_keys=True))}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
