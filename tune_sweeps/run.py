"""A sweep from start to end on Ray Tune; `--resume` continues it after anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray import tune
from ray.tune import FailureConfig, ResultGrid, RunConfig, Tuner

from actors.cluster.connect import connected
from actors.cluster.placement import Bundle, alive_nodes, check_plan, local_cpus, local_gpus, plan_bundles
from dvpo_service.commands.warmstart import base_model
from dvpo_service.config import Config
from dvpo_service.data.splits import load_data
from dvpo_service.errors import ConfigError, UserError
from dvpo_service.terminal import make_console, warn_of
from dvpo_service.tracking.store import tracking_uri
from tune_sweeps.grid import Grid
from tune_sweeps.plan import Job, find_grid, plan_trials, resolve
from tune_sweeps.records import Sweep, read_sweep, save_sweep
from tune_sweeps.space import one_draw, param_space, tune_config
from tune_sweeps.tracking import close_parent, open_parent
from tune_sweeps.trainable import OWN_CPU, run_trial, trial_resources

RETRIES = 2


def run_sweep(
    grid_name: str,
    config: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    max_concurrent: int | None = None,
    resume: bool = False,
) -> tuple[Path, int]:
    """Run every arm with every seed and write the report; returns its path and the number of failed trials.

    A trial that fails is tried again from its checkpoint, ``RETRIES`` times, and does not sink the others.

    Raises:
      ConfigError: whatever is wrong with grid, config or budget, before anything starts; or ``folder`` holds
        another sweep, or none to resume.
    """
    grid = find_grid(grid_name)
    probe = plan_trials(grid, config, overrides, seeds) if grid.arms else []
    first = probe[0].config if probe else resolve(config, overrides, one_draw(grid), seeds[0])
    warn_of(first)
    sweep = _open(
        Sweep(folder, grid, config, list(overrides), list(seeds), None, None, grid_source=_source(grid_name)), resume
    )
    slots = max_concurrent or _default_slots(first)
    largest = max((t.config for t in probe), key=lambda c: len(plan_bundles(c)), default=first)
    with connected(_with_cpus(largest, slots)):
        _check_budget(largest, slots)
        if sweep.mlflow_run_id is None and first.tracking.mlflow:
            uri, run_id = open_parent(first, sweep)
            sweep = replace(sweep, mlflow_uri=uri, mlflow_run_id=run_id)
        elif sweep.mlflow_run_id:  # resumed: the file has no password of it
            sweep = replace(sweep, mlflow_uri=tracking_uri(first, folder))
        save_sweep(sweep)
        job = Job.of(sweep, _base_models(sweep))
        results = _tuner(job, grid, slots).fit()
        close_parent(sweep)
    _say(results, folder)
    from tune_sweeps.report import write_report  # matplotlib and scipy: not needed until here

    return write_report(folder, mlflow_uri=sweep.mlflow_uri), results.num_errors


def _source(grid: str) -> str:
    """As given, and a file so that the command works from anywhere."""
    return str(Path(grid).absolute()) if Path(grid).is_file() else grid


def _open(sweep: Sweep, resume: bool) -> Sweep:
    """The sweep to run: new, or the one in its folder when that is the same and ``resume`` is given."""
    if not (sweep.folder / "sweep.json").is_file():
        if resume:
            raise ConfigError(f"{sweep.folder}: no sweep to resume there")
        return sweep
    old = read_sweep(sweep.folder)
    if not resume:
        raise ConfigError(f"{sweep.folder} holds a sweep already; give --resume to continue it, or another --run-dir")
    for what in ("config", "overrides", "seeds"):
        if getattr(old, what) != getattr(sweep.masked(), what):
            raise ConfigError(
                f"{sweep.folder} was started with {what} {getattr(old, what)}, not {getattr(sweep.masked(), what)}; "
                "give the same command with --resume, or another --run-dir"
            )
    if old.grid.name != sweep.grid.name:
        raise ConfigError(f"{sweep.folder} holds the grid {old.grid.name!r}, not {sweep.grid.name!r}")
    return replace(sweep, mlflow_run_id=old.mlflow_run_id, mlflow_uri=old.mlflow_uri)


def _default_slots(config: Config) -> int:
    """Here: a trial keeps two cores busy. On a cluster: as many as fit; Tune finds out."""
    remote = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if remote:
        return 0
    return max(1, min((os.cpu_count() or 1) // 2, local_gpus() or 10**6))


def _with_cpus(config: Config, slots: int) -> Config:
    """A cluster started here declares enough logical CPUs for all slots."""
    if config.cluster.num_cpus:
        return config
    need = int(slots * (local_cpus(plan_bundles(config)) + 1)) + 1
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"num_cpus": need})})


def _check_budget(config: Config, slots: int) -> None:
    bundles = [Bundle("trial", 0, {"CPU": OWN_CPU}), *plan_bundles(config)] * max(1, slots)
    try:
        check_plan(bundles, alive_nodes())
    except UserError as error:
        raise ConfigError(f"{max(1, slots)} trials at a time: {error}; or lower --max-concurrent") from error


def _base_models(sweep: Sweep) -> dict[int, str | None]:
    """By seed; made before the trials, so that no two of them make the same one. None for a model given by path."""
    models: dict[int, str | None] = {}
    for seed in sweep.seeds:
        config = resolve(sweep.config, sweep.overrides, {}, seed)
        warm = config.model.warmstart is not None
        models[seed] = base_model(config, load_data(config.data).train, sweep.folder.parent) if warm else None
    return models


def _tuner(job: Job, grid: Grid, slots: int) -> Tuner:
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, job=job), lambda params: trial_resources(job.trial(params).config)
    )
    space = param_space(grid, job.seeds)
    storage = str(job.folder / "tune")
    if Tuner.can_restore(storage):
        return Tuner.restore(storage, trainable, resume_errored=True, param_space=space)
    return Tuner(
        trainable,
        param_space=space,
        tune_config=tune_config(grid, slots),
        run_config=RunConfig(
            name="tune",
            storage_path=str(job.folder),
            failure_config=FailureConfig(max_failures=RETRIES),
            verbose=1,
        ),
    )


def _say(results: ResultGrid, folder: Path) -> None:
    failed = results.num_errors
    text = f"{len(results) - failed} of {len(results)} trials done"
    if failed:
        text += f"; {failed} failed after {RETRIES + 1} attempts: the report says why; --resume tries them again"
    make_console().print(f"{text}. Runs: {folder / 'trials'}")
