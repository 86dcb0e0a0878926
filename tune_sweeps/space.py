"""Translate a grid for Ray Tune: what it searches over, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import tune

from dvpo_service.errors import ConfigError
from tune_sweeps.grid import Grid


def param_space(grid: Grid, seeds: Sequence[int]) -> dict[str, Any]:
    """Return Tune's space: ``{"trial": (arm, seed)}`` for arms, ``{"seed", "space": {key: value}}`` if sampled."""
    if grid.arms:
        return {"trial": tune.grid_search([(arm.name, seed) for seed in seeds for arm in grid.arms])}
    drawn = _samplers(grid)
    # A searcher chooses every value itself and supports no grid search.
    seed = tune.choice(list(seeds)) if grid.search == "optuna" else tune.grid_search(list(seeds))
    return {"seed": seed, "space": drawn}


def one_draw(grid: Grid) -> dict[str, Any]:
    """Return one setting drawn from a sampled grid, to check that the config takes it."""
    return {key: sampler.sample() for key, sampler in _samplers(grid).items()}


def _samplers(grid: Grid) -> dict[str, Any]:
    return {key: _sampler(kind, given) for key, sampler in grid.space.items() for kind, given in sampler.items()}


def _sampler(kind: str, given: Any) -> Any:
    try:
        return tune.choice(given) if kind == "choice" else getattr(tune, kind)(*given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampler {kind}: {given}: {error}") from error


def tune_config(grid: Grid, slots: int) -> tune.TuneConfig:
    """Return Tune's config for ``slots`` trials at a time; 0 stands for as many as the cluster holds."""
    search = scheduler = None
    if grid.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch()
    if grid.scheduler == "asha":
        from ray.tune.schedulers import ASHAScheduler

        scheduler = ASHAScheduler(time_attr="step", max_t=10**9, grace_period=1)
    steered = bool(search or scheduler)
    return tune.TuneConfig(
        metric=grid.metric if steered else None,
        mode="max" if steered else None,
        num_samples=grid.num_samples,
        search_alg=search,
        scheduler=scheduler,
        max_concurrent_trials=slots or None,
        reuse_actors=True,  # so that the next trial uses the engines that are running already
        trial_name_creator=trial_label,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def trial_label(trial: Any) -> str:
    """Return the name of a trial in Tune's table."""
    given = trial.config.get("trial")
    return f"{given[0]}-seed{given[1]}" if given else str(trial.trial_id)
