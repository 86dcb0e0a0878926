"""Make sweep folders like those of a real sweep, with seeded random numbers in place of training."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tune_sweeps.grid import GRIDS, Grid
from tune_sweeps.records import Sweep, TrialState, save_sweep, trial_folder

TERMS = ("qr", "risk", "cvar", "gain", "shift", "shape", "curv", "consist")
# Effect of each arm on accuracy in this synthetic data: (in distribution, out of distribution).
EFFECT = {"no-gain": (-0.01, -0.09), "no-cvar": (-0.04, -0.05), "no-shift": (0.03, 0.02), "qr-only": (-0.08, -0.15)}


def save_grid(folder: Path, grid: Grid | str, seeds: Sequence[int] = (0, 1, 2), **fields: Any) -> Sweep:
    """Write ``sweep.json`` only."""
    grid = GRIDS[grid] if isinstance(grid, str) else grid
    rest: dict[str, Any] = {"overrides": [], "mlflow_run_id": None, "mlflow_uri": None} | fields
    sweep = Sweep(folder=folder, grid=grid, config="demo", seeds=list(seeds), **rest)
    save_sweep(sweep)
    return sweep


def save_trial(
    folder: Path,
    arm: str,
    seed: int,
    *,
    after: Mapping[str, float | None] | None = None,
    before: Mapping[str, float | None] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    **state: Any,
) -> Path:
    """Write one trial and return its folder. The accuracies ``after`` and ``before``, by split, make its summary."""
    trial = folder / "trials" / trial_folder(arm, seed)
    trial.mkdir(parents=True)
    fields: dict[str, Any] = {"status": "done", "attempts": 1, "seconds": 60.0} | state
    TrialState(arm, seed, **fields).save(trial)
    (trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if after is not None:
        summary = {
            "held_out_before": before or {},
            "held_out_after": after,
            "held_out_greedy_before": before or {},
            "held_out_greedy_after": after,
            "warnings": list(warnings),
        }
        (trial / "summary.json").write_text(json.dumps(summary))
    return trial


def random_sweep(
    folder: Path,
    grid: Grid | str = "leave-one-out",
    seeds: Sequence[int] = (0, 1, 2),
    *,
    splits: Sequence[str] = ("id", "ood"),
    steps: int = 60,
    critic: bool = True,
    noise: float = 0.0,
) -> Sweep:
    """Write a sweep in which every arm has finished with every seed."""
    sweep = save_grid(folder, grid, seeds, overrides=["trainer.num_steps=60"])
    for arm in sweep.grid.arms:
        for seed in seeds:
            rng = np.random.default_rng([seed, zlib.crc32(arm.name.encode())])
            rows = list(_rows(rng, arm.name, arm.removes, seed, splits, steps, critic, noise))
            ends = [{s: row[f"eval/{s}/accuracy"] for s in splits} for row in (rows[0], rows[-1])]
            warnings = ["step 25 [critic_not_learning] The critic explains nothing"] if seed == 1 else []
            save_trial(folder, arm.name, seed, before=ends[0], after=ends[1], rows=rows, warnings=warnings)
    return sweep


def _rows(
    rng: np.random.Generator,
    arm: str,
    removed: str | None,
    seed: int,
    splits: Sequence[str],
    steps: int,
    critic: bool,
    noise: float,
) -> Any:
    start = 0.5 + 0.02 * seed
    for step in range(steps + 1):
        row: dict[str, Any] = {"step": step, "time": 0.0}
        learned = 1 - np.exp(-4 * step / steps)
        if step:
            clean = start + 0.35 * learned + 0.02 * rng.standard_normal()
            row |= {
                "reward/clean_mean": clean,
                "reward/mean": clean - noise * (2 * clean - 1),
                "policy/skipped_steps": 0.0,
            }
            if critic:
                row |= _critic(rng, removed, learned, clean)
        if step % (steps // 6) == 0:
            for i, split in enumerate(splits):
                effect = EFFECT.get(arm, (0.0, 0.0))[min(i, 1)]
                gain = (0.4 if i == 0 else 0.12) + effect
                row[f"eval/{split}/accuracy"] = start + gain * learned + 0.012 * rng.standard_normal()
                row[f"eval/{split}/greedy"] = start + gain * learned
        yield row


def _critic(rng: np.random.Generator, removed: str | None, learned: float, clean: float) -> dict[str, float]:
    low = {t: 0.3 * np.exp(-3 * learned) * rng.lognormal(0, 0.2) + 0.01 for t in TERMS}
    if removed:
        low[removed] *= 1 + 12 * learned
    return {f"critic/loss/{t}": v for t, v in low.items()} | {
        "critic/quantile_mean": clean
        + (0.3 if removed == "shape" else 0.05) * (1 - learned)
        - (0.06 if removed == "shift" else 0.01) * rng.lognormal(0, 0.2),
        "critic/return_mean": clean,
        "critic/lower_tail_mean": 0.2 + (0.1 if removed == "cvar" else 0.02) * rng.standard_normal(),
        "critic/head_disagreement": (0.2 if removed == "consist" else 0.02) * rng.lognormal(0, 0.1),
        "critic/skipped_steps": 0.0,
    }
