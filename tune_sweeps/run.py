"""Run a sweep on Ray Tune from start to end, or continue an interrupted one with ``--resume``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray import tune
from ray.tune import FailureConfig, ResultGrid, RunConfig, Tuner

from actors.cluster.connect import connected
from actors.cluster.placement import Bundle, alive_nodes, check_plan, local_cpus, local_gpus, plan_bundles
from dvpo_service.commands.check_plugins import check_plugins
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
from tune_sweeps.watch import SweepWatch

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
    """Run every arm with every seed, and write the report.

    A trial that fails is tried again from its checkpoint, ``RETRIES`` times. The other trials go on.

    Args:
      max_concurrent: number of trials that run at the same time; by default as many as fit.
      resume: continue the sweep in ``folder``.

    Returns:
      The path of the report, and the number of failed trials.

    Raises:
      ConfigError: the grid, the config or the budget is wrong, found before anything starts; or ``folder`` holds
        another sweep, or none to resume.
    """
    grid = find_grid(grid_name)
    probe = plan_trials(grid, config, overrides, seeds) if grid.arms else []
    first = probe[0].config if probe else resolve(config, overrides, one_draw(grid), seeds[0])
    warn_of(first)
    for one in [trial.config for trial in probe if trial.seed == seeds[0]] or [first]:
        check_plugins(one)
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
        elif sweep.mlflow_run_id:  # resumed: the URI in sweep.json has no password
            sweep = replace(sweep, mlflow_uri=tracking_uri(first, folder))
        save_sweep(sweep)
        job = Job.of(sweep, _base_models(sweep))
        results = _tuner(job, grid, slots).fit()
        close_parent(sweep)
    _say(results, folder)
    from tune_sweeps.report import write_report  # imports matplotlib and scipy, not needed before

    return write_report(folder, mlflow_uri=sweep.mlflow_uri), results.num_errors


def _source(grid: str) -> str:
    """Return the grid as it was given, a file as an absolute path, so that the command works from anywhere."""
    return str(Path(grid).absolute()) if Path(grid).is_file() else grid


def _open(sweep: Sweep, resume: bool) -> Sweep:
    """Return the sweep to run: a new one, or with ``resume`` the same sweep that is already in the folder."""
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
    """Return how many trials run at a time; on a cluster 0, so that Tune starts what fits.

    Here it is one for two cores, or for each core where a trial is one process.
    """
    remote = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if remote:
        return 0
    cores = 1 if config.cluster.in_process else 2
    return max(1, min((os.cpu_count() or 1) // cores, local_gpus() or 10**6))


def _with_cpus(config: Config, slots: int) -> Config:
    """Return the config with enough logical CPUs for all slots, in case the cluster is started here."""
    if config.cluster.num_cpus:
        return config
    need = int(slots * (local_cpus(plan_bundles(config)) + 1)) + 1
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"num_cpus": need})})


def _check_budget(config: Config, slots: int) -> None:
    """Raise ConfigError if the cluster has no room for ``slots`` trials."""
    bundles = [Bundle("trial", 0, {"CPU": OWN_CPU}), *plan_bundles(config)] * max(1, slots)
    try:
        check_plan(bundles, alive_nodes())
    except UserError as error:
        raise ConfigError(f"{max(1, slots)} trials at a time: {error}; or lower --max-concurrent") from error


def _base_models(sweep: Sweep) -> dict[int, str | None]:
    """Return the path of the base model for each seed; None where the config gives a path.

    The models are made before the trials start, so that no two trials make the same one.
    """
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
            verbose=0,  # Tune would print a box of its own for every event
            callbacks=[SweepWatch()],
        ),
    )


def _say(results: ResultGrid, folder: Path) -> None:
    """Print how many trials are done and how many failed."""
    failed = results.num_errors
    text = f"{len(results) - failed} of {len(results)} trials done"
    if failed:
        text += f"; {failed} failed after {RETRIES + 1} attempts: the report says why; --resume tries them again"
    make_console().print(f"{text}. Runs: {folder / 'trials'}")
